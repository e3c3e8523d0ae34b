"""Formats: the caches of other tools, and plain tables, each read or written by one class.

A format that is read has a subclass of `ForeignCache`; one that is written has a function that takes a `Cache` and a
new file or folder. The table of both is here and nowhere else; classes are imported when they are used.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kdcache.errors import ConfigError
from kdcache.interop.foreign_row import ForeignRow

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.selection import Selection
    from kdcache.store.manifest import Manifest

LOGPROBS, LOGITS, WEIGHTS = "logprobs", "logits", "weights"
"""What a format keeps of an entry: its log-probability over the whole vocabulary (or what is said to be one); its
logit, with no normaliser; or its share of a number of draws."""


class ForeignCache(ABC):
    """A cache of another tool, opened for reading. Nothing in it is trusted, and nothing of it is run.

    A subclass is built with (path, tokens): the file or folder, and a file with the token ids of its sequences, for
    formats that keep none.

    Attributes:
        format: its name.
        values: what it keeps of an entry: `LOGPROBS`, `LOGITS` or `WEIGHTS`.
        vocab_size: token ids lie below it; None where the cache does not say.
        selection: how weights were drawn, where values are `WEIGHTS`; known once a row has been read.
        isolated: whether the teacher saw each piece alone; None where the cache does not say.
        tokenizer_sha256: fingerprint of the teacher's tokenizer; None where the cache does not say.

    Raises:
        CorpusError: the path holds no cache of this format, or a damaged one.
        ConfigError: it needs `tokens`, or another option.
    """

    format: ClassVar[str]
    values: str = LOGPROBS
    vocab_size: int | None = None
    selection: Selection | None = None
    isolated: bool | None = None
    tokenizer_sha256: str | None = None

    @abstractmethod
    def __init__(self, path: str, tokens: str | None = None) -> None: ...

    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """What can be read by itself, in order: row groups, archive members, files."""

    @abstractmethod
    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The sequences of a part, in order.

        Raises:
            CorpusError: it is damaged.
        """

    def rows(self) -> Iterator[ForeignRow]:
        """All sequences, in order."""
        for part in self.parts():
            yield from self.read(part)


class Writer(Protocol):
    """Writes all rows of a cache, one at a time, into a file or folder that does not exist yet."""

    def __call__(self, cache: Cache, out: Path, on_row: Any) -> None:
        """Write; `on_row` is called after each row with the number of rows so far."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format, and where the code of it is.

    Attributes:
        name: for `--as`.
        reader: `module:class` of a `ForeignCache`; empty where it is not read.
        writer: `module:function`, a `Writer`; empty where it is not written.
        lost: `module:function` that says, of a manifest, what the format cannot hold, a sentence each.
        folder: whether it is written as a folder.
    """

    name: str
    reader: str = ""
    writer: str = ""
    lost: str = ""
    folder: bool = False

    def open(self, path: str, tokens: str | None = None) -> ForeignCache:
        """Open a cache of this format."""
        found: ForeignCache = _load(self.reader)(path, tokens)
        return found

    def write(self, cache: Cache, out: Path, on_row: Any) -> None:
        """Write a cache in this format."""
        _load(self.writer)(cache, out, on_row)

    def lost_of(self, manifest: Manifest) -> list[str]:
        """What this format cannot hold of a cache."""
        found: list[str] = _load(self.lost)(manifest)
        return found


_HERE = "kdcache.interop"

FORMATS = (
    Format(name="parquet", writer=f"{_HERE}.tables:write_parquet", lost=f"{_HERE}.row_table:lost"),
    Format(name="arrow", writer=f"{_HERE}.tables:write_arrow", lost=f"{_HERE}.row_table:lost"),
    Format(name="jsonl", writer=f"{_HERE}.tables:write_jsonl", lost=f"{_HERE}.row_table:lost"),
    Format(name="zarr", writer=f"{_HERE}.zarr_arrays:write", lost=f"{_HERE}.row_table:lost", folder=True),
    Format(
        name="distillkit", reader=f"{_HERE}.distillkit:DistillKitCache", writer=f"{_HERE}.distillkit:write",
        lost=f"{_HERE}.distillkit:lost", folder=True,
    ),
    Format(
        name="megatron", reader=f"{_HERE}.megatron:MegatronCache", writer=f"{_HERE}.megatron:write",
        lost=f"{_HERE}.megatron:lost", folder=True,
    ),
    Format(
        name="topk-jsonl", reader=f"{_HERE}.topk_jsonl:TopkJsonl", writer=f"{_HERE}.topk_jsonl:write",
        lost=f"{_HERE}.topk_jsonl:lost",
    ),
    Format(name="axolotl", reader=f"{_HERE}.axolotl:AxolotlCache"),
    Format(name="maxtext", reader=f"{_HERE}.maxtext:MaxTextCache"),
    Format(name="se-kd", reader=f"{_HERE}.sekd:SeKdCache"),
    Format(name="kdcache", reader=f"{_HERE}.own:OwnCache"),
)  # fmt: skip
"""All formats. `kdcache` is read for audits only: its caches are opened by `open_cache`."""

WRITTEN = tuple(each.name for each in FORMATS if each.writer)
READ = tuple(each.name for each in FORMATS if each.reader)


def find_format(name: str, among: Sequence[str]) -> Format:
    """A format by its name.

    Raises:
        ConfigError: it is not among these names.
    """
    if name not in among:
        raise ConfigError(f"as_ is {name[:40]}, but must be one of {', '.join(among)}")
    return next(each for each in FORMATS if each.name == name)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
