"""Runs the stages of a recipe, each as the command that it is, in a process of its own.

    OUT/dump/                what the stage dump leaves
    OUT/stages/dump.toml     its options: `kdcache dump-teacher --config OUT/stages/dump.toml` is the stage, run by hand
    OUT/stages/dump.json     the record of its result: what it was made from, and what the command printed; written last

A stage whose record stands is skipped. One that was stopped is given to its command again, which goes on where it was.
A record of other options, or of a stage that waits for one with other options, is refused and not overwritten. While a
stage runs, it is locked; its process holds the lock too, so the lock lives as long as either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache import stopping
from kdcache.errors import ConfigError, StageError
from kdcache.recipes.options import to_toml
from kdcache.recipes.recipe import Stage
from kdcache.store.atomic_files import storage_errors, taken, write_over

OnStage = Callable[[int, int, str], None]
"""Called with the stages done, those to do, and the name of the one that begins."""


class RecipeRun:
    """The stages of a recipe in a folder.

    Args:
        stages: in the order in which they are run.
        out: the folder.
        program: the words that start kdcache, before the name of a command.
        flags: further words of each command, which decide what it says on stderr.
        heard: whether that is passed on as it is said; on a terminal it always is.

    Raises:
        ConfigError: the folder is none, or holds results of other options.
    """

    def __init__(
        self, stages: Sequence[Stage], out: Path, program: Sequence[str], flags: Sequence[str] = (), heard: bool = False
    ) -> None:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"out {out} is a file, but must be a folder")
        self.stages, self._out, self._program = stages, out, program
        self._flags, self._heard = flags, heard
        self._records = {stage.name: self._read(stage) for stage in stages}

    def stands(self, stage: Stage) -> bool:
        """Whether the result of a stage is there."""
        return self._records[stage.name] is not None

    def write_options(self) -> None:
        """Write the options of each stage, so that it can be run by hand.

        Raises:
            CacheError: they cannot be written.
        """
        for stage in self.stages:
            self._write_options(stage)

    def command(self, stage: Stage) -> list[str]:
        """The words, after `kdcache`, that run a stage by hand."""
        return [stage.command, "--config", str(self._path(stage, "toml"))]

    def run(self, only: str | None = None, on_stage: OnStage | None = None) -> list[dict[str, Any]]:
        """Run the stages whose result is not there.

        Args:
            only: the name of the one stage to run; those that it waits for must be there.
            on_stage: called before each.

        Returns:
            Of each stage its `name`, `command`, `state` (`made` or `stood`), `seconds`, and `record`.

        Raises:
            ConfigError: no such stage, one that it waits for is not there, or another process runs it.
            StageError: its command failed.
            Stopped: this process, or the command, was told to stop.
        """
        wanted = [stage for stage in self.stages if only in (None, stage.name)]
        if not wanted:
            raise ConfigError(f"stage {only} is none of {', '.join(stage.name for stage in self.stages)}")
        found = []
        for number, stage in enumerate(wanted):
            missing = [name for name in stage.needs if self._records[name] is None]
            if missing:
                raise ConfigError(f"stage {stage.name} waits for {', '.join(missing)}, which is not there yet")
            if on_stage:
                on_stage(number, len(wanted), stage.name)
            stood = self.stands(stage)
            if not stood:
                with self._locked(stage) as handle:
                    self._records[stage.name] = self._read(stage) or self._make(stage, handle)
            record = self._records[stage.name] or {}
            found.append({
                "name": stage.name, "command": stage.command, "state": "stood" if stood else "made",
                "seconds": record["seconds"], "record": str(self._path(stage, "json")),
            })  # fmt: skip
        return found

    def result(self, name: str) -> dict[str, Any]:
        """What the command of a stage whose result is there has printed."""
        record = self._records[name]
        assert record is not None, f"{name} has not been run"
        summary: dict[str, Any] = record["summary"]
        return summary

    def _path(self, stage: Stage, kind: str) -> Path:
        return self._out / "stages" / f"{stage.name}.{kind}"

    def _read(self, stage: Stage) -> dict[str, Any] | None:
        """The record of a stage, if its result is there."""
        path = self._path(stage, "json")
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            identity = record["identity"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no record of a stage; delete it, and the stage is run again") from None
        if identity != stage.identity:
            old = {**record.get("options", {}), "command": record.get("command")}
            new = {**stage.options, "command": stage.command}
            differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            what = f"other options ({', '.join(differing)})" if differing else "stages of other options before it"
            raise ConfigError(
                f"stage {stage.name} in {self._out} was made with {what}; choose another folder, or delete {path} and "
                f"{self._out / stage.name}"
            )
        return record if not stage.leaves_folder or (self._out / stage.name).exists() else None

    def _write_options(self, stage: Stage) -> None:
        path = self._path(stage, "toml")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if stage.leaves_folder:
                (self._out / stage.name).parent.mkdir(parents=True, exist_ok=True)
        write_over(path, to_toml({**stage.options, **stage.chosen}).encode())

    @contextmanager
    def _locked(self, stage: Stage) -> Iterator[int]:
        path = self._path(stage, "lock")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if taken(handle):
                raise ConfigError(f"stage {stage.name} in {self._out} is being run by another process; wait for it")
            yield handle
        finally:
            os.close(handle)

    def _make(self, stage: Stage, handle: int) -> dict[str, Any]:
        """Run the command of a stage and write its record."""
        self._write_options(stage)
        words = [*self._program, *self.command(stage), "--json", *self._flags]
        shown = self._heard or sys.stderr.isatty()
        started = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=None if shown else subprocess.PIPE, pass_fds=(handle,)
        )
        try:
            output, errors = process.communicate()
        except BaseException:  # told to stop: so is the command, which ends a unit of its work
            if process.poll() is None:
                process.terminate()
                process.communicate()
            raise
        said = (errors or b"").decode(errors="replace")
        if process.returncode == stopping.EXIT_CODE:
            raise stopping.Stopped
        if process.returncode:
            raise StageError(_reason(stage, process.returncode, said), process.returncode, said)
        record = {
            "command": stage.command,
            "options": stage.options,
            "needs": list(stage.needs),
            "identity": stage.identity,
            "seconds": time.perf_counter() - started,
            "summary": json.loads(output),
        }
        write_over(self._path(stage, "json"), (json.dumps(record, indent=2) + "\n").encode())
        return record


def _reason(stage: Stage, code: int, said: str) -> str:
    """Why a stage failed, in one sentence."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and lines:
        return f"stage {stage.name} ({stage.command}): {lines[-1].removeprefix('error: ')}"
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"stage {stage.name} ({stage.command}) ended {how}"
