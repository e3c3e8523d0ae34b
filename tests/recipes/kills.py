"""A recipe that is stopped at random moments, in each of its stages.

The recipe is the real command, and each stage a process of its own, all in one group of processes that can be stopped
together. None is started anew, for that would be most of the time: each is a fork of one that has imported everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.processes import PATIENCE, ReadyMade

WAYS: dict[str, Callable[[ReadyMade], None]] = {
    "SIGKILL": lambda process: process.kill(),
    "SIGKILL to all": lambda process: os.killpg(process.pid, signal.SIGKILL),
    "SIGTERM": lambda process: process.terminate(),
    "SIGTERM to all": lambda process: os.killpg(process.pid, signal.SIGTERM),
}
"""Ways to stop a recipe: alone, as a user does; with the command that it runs, as a cluster does."""


def distil(*words: object) -> ReadyMade:
    """`kdcache distil words --json`, at the head of a group of processes."""
    given = ["distil", *map(str, words), "--json"]
    process = ReadyMade("-c", f"from tests.recipes.kills import be_recipe; be_recipe({given!r})")
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and os.getpgid(process.pid) != process.pid:
        assert time.monotonic() < deadline, "the recipe does not begin"
        time.sleep(0.005)
    return process


def be_recipe(words: list[str]) -> None:
    """Be the command, whose stages are forks of this process."""
    from kdcache.recipes import run

    os.setpgid(0, 0)
    run.subprocess.Popen = Fork  # type: ignore[attr-defined]
    sys.argv = ["kdcache", *words]
    runpy.run_module("kdcache_cli", run_name="__main__")


class Fork:
    """A `subprocess.Popen` of `python -m MODULE words` that is a fork of this process, with all that it has open."""

    def __init__(self, words: Sequence[str], **_: Any) -> None:
        self.returncode: int | None = None
        ends = [os.pipe(), os.pipe()]
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if not self._pid:
            for number, (_read, write) in enumerate(ends, 1):
                os.dup2(write, number)
            _become(list(words[2:]))
        self._streams: list[IO[bytes]] = [os.fdopen(read, "rb") for read, _ in ends]
        for _, write in ends:
            os.close(write)

    def communicate(self) -> tuple[bytes, bytes]:
        out, err = (stream.read() for stream in self._streams)  # what a stage says fits into a pipe
        while self.poll() is None:
            time.sleep(0.002)
        return out, err

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self._pid, signal.SIGTERM)


def _become(words: list[str]) -> None:
    """Be `python -m words`, in a process that was just forked; never returns."""
    from kdcache import stopping

    code = 1
    try:
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        stopping._state.asked_at, stopping._state.blocks = None, 0
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop_in_each_stage(
    words: Sequence[object], out: Path, seconds: dict[str, float], seed: int
) -> Iterator[tuple[str, str, float, int]]:
    """Run a recipe until each of its stages has begun, and stop it at some moment after that; then begin again.

    Args:
        words: of the command.
        out: its folder.
        seconds: that each stage takes, in the order in which they are run.
        seed: of the moments and of the ways.

    Yields:
        The stage in which it was to be stopped, the way, the seconds after its begin, and its exit code.
    """
    moments = random.Random(seed)
    for stage, longest in seconds.items():
        way, after = moments.choice([*WAYS]), moments.random() * longest
        options, record = out / f"stages/{stage}.toml", out / f"stages/{stage}.json"
        before, process = _written(options), distil(*words)
        _wait(lambda: _written(options) != before or record.exists(), process)  # noqa: B023
        began = time.monotonic()
        _wait(lambda: time.monotonic() >= began + after, process)  # noqa: B023
        if process.poll() is None:
            WAYS[way](process)
        _, err = process.communicate()
        assert process.returncode in (0, 75, -signal.SIGKILL, -signal.SIGTERM), (stage, way, process.returncode, err)
        while not free(out):  # the command may outlive the recipe
            time.sleep(0.02)
        yield stage, way, after, process.returncode


_FIGURES = ("heldout", "students", "layers", "parameters", "rows", "labels", "entries", "bytes", "documents", "lengths")
"""Of what a command says: what is not of this one process."""
_WITH_TIMES = ("metrics.jsonl", "summary.json")
"""Files of a training that hold times beside its figures, which its record has, too."""


def left_behind(out: Path) -> dict[str, Any]:
    """What a recipe has left: the bytes of every file but checkpoints, and of what stages said all but times."""
    found: dict[str, Any] = {}
    for path in out.rglob("*"):
        name = path.relative_to(out)
        if path.is_file() and not any(part.startswith("checkpoint-") for part in name.parts):
            found[str(name)] = path.read_bytes()
    for name in list(found):
        if name.startswith("stages/") and name.endswith(".json"):
            said = json.loads(found[name])["summary"]
            found[name] = {figure: said[figure] for figure in _FIGURES if figure in said}
        elif Path(name).name in _WITH_TIMES:
            del found[name]
    return found


def free(out: Path) -> bool:
    """Whether no stage's command is at work."""
    for path in (out / "stages").rglob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _wait(true: Callable[[], bool], process: ReadyMade) -> None:
    """Wait for something, or for the end of a process."""
    deadline = time.monotonic() + PATIENCE
    while not true() and process.poll() is None:
        assert time.monotonic() < deadline, "the recipe hangs"
        time.sleep(0.005)
