"""What a run is, kept in its folder: a run in that folder resumes the same run, or is refused.

`train-student.json` describes the run: configuration, caches, rows. Files of JSON lines, a line a step, are appended to
and cut back to the step of the checkpoint from which a run is resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError
from kdcache.store.atomic_files import storage_errors, taken
from kdcache.student import distributed
from kdcache.student.caches import CacheSource
from kdcache.student.config import TrainConfig
from kdcache.student.model_card import versions
from kdcache.student.rollouts import RUN, TEACHERS
from kdcache.student.split import Split


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def cut(path: Path, step: int) -> None:
    """Drop the lines after a step: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
        return math.inf


CONFIG = RUN

_READING = ("cache", "pool", "readers", "local_copy", "local_limit", "record_rows")
_STEP = ("batch_rows", "accumulate", "ranks")
_FREE_TO_CHANGE = (
    *_READING, *_STEP, "rows_per_step", "out", "resume", "device", "save_every", "keep", "eval_every", "log_to",
    "gradient_checkpointing", TEACHERS, *versions(),
)  # fmt: skip

Fields = dict[str, Any]


def rows_per_step(config: TrainConfig) -> int:
    """Rows of one optimiser step, over accumulation and ranks."""
    return config.batch_rows * config.accumulate * distributed.world()


def describe(config: TrainConfig, sources: Sequence[CacheSource]) -> Fields:
    """What a run is: its configuration (paths of models made absolute), its caches, and its versions."""
    fields = {
        **dataclasses.asdict(config),
        "student": _absolute(config.student),
        "init_from": _absolute(config.init_from),
        "rows_per_step": rows_per_step(config),
        "ranks": distributed.world(),
        "caches": [source.record() for source in sources],
        TEACHERS: sorted({each.cache.manifest.teacher_sha256 for source in sources for each in source.teachers}),
        **versions(),
    }
    plain: Fields = json.loads(json.dumps(fields))
    return plain


def _absolute(name: str | None) -> str | None:
    """A path that exists as an absolute one; a hub name as it is."""
    path = Path(name or "").expanduser()
    return str(path.resolve()) if name and path.exists() else name


def saved_description(out: Path) -> Fields | None:
    """The description of the run in a folder, if there is one."""
    try:
        fields: Fields = json.loads((out / CONFIG).read_text())
    except FileNotFoundError:
        return None
    return fields


def require_free_or_same(out: Path, resume: bool, fields: Fields) -> None:
    """Refuse a folder of something else, a run that is not to be resumed, and a run of another configuration.

    Raises:
        ConfigError: naming what differs.
    """
    old = saved_description(out)
    if old is None:
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
            raise ConfigError(f"{out} holds other files and no training run; choose another folder")
        return
    if not resume:
        raise ConfigError(
            f"{out} already holds a training run; pass resume=True to continue it, or choose another folder"
        )
    differing = [
        f"{name} (was {old.get(name)}, now {value})"
        for name, value in fields.items()
        if name not in _FREE_TO_CHANGE and old.get(name) != value
    ]
    if differing:
        raise ConfigError(f"{out} holds a run of another configuration; it differs in {', '.join(differing)}")
    if old["rows_per_step"] != fields["rows_per_step"]:
        raise ConfigError(
            f"batch_rows {fields['batch_rows']} x accumulate {fields['accumulate']} x {fields['ranks']} rank(s) is "
            f"{fields['rows_per_step']} rows a step, but the run in {out} takes {old['rows_per_step']} "
            f"({old['batch_rows']} x {old['accumulate']} x {old['ranks']}); choose numbers whose product is that"
        )


def require_same_rows(out: Path, split: Split) -> None:
    """Refuse to resume a run with other rows than it began with.

    Raises:
        ConfigError: they are others; what a run keeps of `where` was changed.
    """
    old = saved_description(out)
    if old is not None and old["training_rows"] != split.record():
        raise ConfigError(f"{out} holds a run over other rows: its rows.npz was changed; delete that file")


def write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Hold the folder of a run: a launcher that is killed may leave ranks behind that still write there.

    The folder is created if there is none, and removed again if it stays empty.

    Raises:
        ConfigError: another process holds it.
        CacheError: it cannot be made.
    """
    if out.exists() and not out.is_dir():  # refused later, by `require_free_or_same`
        yield
        return
    new = not out.exists()
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    try:
        if taken(handle):
            raise ConfigError(f"{out} is being written by another run; wait until it ends, or end it")
        yield
    finally:
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()
