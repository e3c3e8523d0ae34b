"""Shards: what every store does alike when it writes and reads the rows of one shard.

A store is a `ShardWriter` and a `Shard`. The writer says how a record becomes bytes (`append`, `finish`), the reader
how it is found again (`open`, `record`). Counting, hashing, publishing and the checks of what a row says are here.
A store from outside adds itself by `register_store` (registry.py).

Guarantee: nothing of a shard is visible before `publish`, and then all of it.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.rows import PackedRow
from kdcache.store.row_format import Extras, Record, RowFormat
from kdcache.store.storage import Storage
from kdcache.store.target_sums import TargetSums
from kdcache.targets import SparseTargets

FOLDER = "shards"

_DAMAGE = (CorruptCacheError, IndexError, OverflowError, ValueError, TypeError, struct.error)
"""What reading damaged bytes can raise, in our code and in the libraries."""


_NO_LEAST = 1 << 62


def shard_stem(shard: int) -> str:
    """How the name of a shard's data begins."""
    return f"{FOLDER}/{shard:05d}"


def record_name(folder: str, shard: int) -> str:
    """The object of a folder that holds the record of a shard."""
    return f"{folder}/{shard:05d}.json"


def recorded_shards(names: Iterable[str], folder: str, shards: int) -> list[int]:
    """The shards, below a number of them, whose records are among the objects of a folder; in order."""
    found = []
    for name in names:
        number = name.removeprefix(f"{folder}/").removesuffix(".json")
        if number.isdecimal() and int(number) < shards and name == record_name(folder, int(number)):
            found.append(int(number))
    return sorted(found)


class Tally:
    """Counts, sums and hashes of the rows of a shard, as its commit names them.

    Attributes:
        rows, labels, positions, entries, tokens, pieces: so far.
        sums: over the targets; of what was read back from a shard they are of rounded values.
    """

    def __init__(self) -> None:
        self.rows = self.labels = self.positions = self.entries = self.tokens = self.pieces = 0
        self.sums = TargetSums()
        self._least, self._most = _NO_LEAST, 0
        self._tokens, self._content = hashlib.sha256(), hashlib.sha256()

    def add(self, row: PackedRow, targets: SparseTargets, record: Record) -> None:
        """Count one more row."""
        self._tokens.update(np.array([len(row.tokens), len(row.piece_lengths)], "<i8").tobytes())
        self._tokens.update(row.tokens.astype("<i4").tobytes())
        self._tokens.update(row.piece_lengths.astype("<i4").tobytes())
        if row.prefixes is not None:
            for piece in range(len(row.prefixes)):
                self._tokens.update(row.prefixes[piece].content)
        record.digest(self._content)
        self.rows += 1
        self.labels += len(targets.count)
        self.positions += record.positions
        self.entries += int(targets.count.sum())
        self.tokens += len(row.tokens)
        self.pieces += len(row.piece_lengths)
        counts = targets.count.numpy()
        counts = counts[counts > 0]
        if len(counts):
            self._least, self._most = min(self._least, int(counts.min())), max(self._most, int(counts.max()))
        self.sums.add(targets)

    def fields(self) -> dict[str, Any]:
        """Counts and hashes under the names that a commit has for them."""
        return {
            "tokens": self.tokens,
            "pieces": self.pieces,
            "least_entries": self._least if self._most else 0,
            "most_entries": self._most,
            "rows": self.rows,
            "labels": self.labels,
            "positions": self.positions,
            "entries": self.entries,
            "tokens_sha256": self._tokens.hexdigest(),
            "content_sha256": self._content.hexdigest(),
        }


class ShardWriter(ABC):
    """Writes one shard; nothing is visible before `publish`. Use it as a context manager.

    A store implements `append` and `finish`, writes through `data.part`, and seals each row with `row_seal`.

    Attributes:
        suffix: with which the name of its object, or of the folder of its objects, ends.
        folder: whether a shard is a folder of objects and not one.
        storage, shard, form: where the cache is, the shard's number, and the format of its rows.
        tally: of what is written so far; `tally.rows` is the number of the row that is appended next.
        data: where it goes.
    """

    suffix: ClassVar[str]
    folder: ClassVar[bool]

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        self.storage, self.shard, self.form = storage, shard, form
        self.tally = Tally()
        self.data = storage.new_data(shard_stem(shard), self.suffix, self.folder)

    def write(
        self, row: PackedRow, targets: SparseTargets, record: Record | None = None, extras: Extras | None = None
    ) -> None:
        """Append a row, the targets of its labelled slots in slot order, and its extras.

        Args:
            row: the tokens.
            targets: of its labelled slots.
            record: all of it, if it is packed already; then `extras` is not looked at.
            extras: see `RowFormat.pack`; every extra of the cache MUST be given.

        Raises:
            TargetError: see `RowFormat.pack`.
            CacheError: the shard cannot be written.
        """
        record = record or self.form.pack(row, targets, extras)
        self.append(record)
        self.tally.add(row, targets, record)

    @abstractmethod
    def append(self, record: Record) -> None:
        """Write one more record. Memory MUST NOT grow with the rows by more than an index needs."""

    @abstractmethod
    def finish(self) -> list[dict[str, Any]]:
        """Write what comes last. Returns the records of all objects (`Sink.record`), in order of name."""

    def publish(self, reader: type[Shard]) -> tuple[list[dict[str, Any]], bool]:
        """Make the data appear; returns its objects, and whether they are these.

        `reader` is the store's own.

        If data of that name exists without a commit, some writer stopped between the two, or is about to
        commit. It appeared whole, so if it holds these tokens it is as good as this and stays; if it is
        damaged it is replaced. Of several writers that find it damaged one replaces it, and the others find
        what that one made.
        """
        objects = self.finish()
        if self.data.publish():
            return objects, True
        with self.storage.exclusive(FOLDER):
            while not self.data.publish():
                existing = self._existing()
                if existing == objects:
                    break
                if existing and self._adopt(existing, reader):
                    return existing, False
                self.storage.delete(self.data.name)
        return objects, True

    def _existing(self) -> list[dict[str, Any]]:
        """The objects under the name of this shard; none if they cannot be read."""
        name = self.data.name
        try:
            names = self.storage.names(name) if self.folder else [name]
            digests = {name: self.storage.digest(name) for name in names}
            return [{"name": name, "bytes": size, "sha256": sha256} for name, (size, sha256) in digests.items()]
        except CacheError:
            return []

    def _adopt(self, existing: list[dict[str, Any]], reader: type[Shard]) -> bool:
        """Whether existing data are sound and hold these tokens; their content is then that of this shard."""
        try:
            found = reader(self.storage, self.shard, self.form, existing, self.tally.rows).count()
        except CorruptCacheError:
            return False
        if found.fields()["tokens_sha256"] != self.tally.fields()["tokens_sha256"]:
            return False
        self.tally = found
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.data.close()


class Shard(ABC):
    """Reads one shard. A store implements `open` and `record`, and trusts neither its objects nor their sizes.

    Args:
        storage: where the cache is.
        shard: its number.
        form: of its rows.
        objects: what its commit says of its objects.
        rows: how many it holds.

    Raises:
        CorruptCacheError: the objects are not the shard that its commit promises.
    """

    def __init__(self, storage: Storage, shard: int, form: RowFormat, objects: list[dict[str, Any]], rows: int) -> None:
        self.storage, self.shard, self.form, self.rows = storage, shard, form, rows
        self.name = self.open(objects)

    @abstractmethod
    def open(self, objects: list[dict[str, Any]]) -> str:
        """Open the objects and check their outer form; the shard's name, for messages."""

    @abstractmethod
    def record(self, row: int) -> Record:
        """The streams of a row, in order of `form.shapes`: their seal checked, none longer than its shape.

        Raises:
            CorruptCacheError: the row is damaged. IndexError, OverflowError, ValueError, TypeError and struct.error
                are taken for the same.
        """

    def read(self, row: int) -> tuple[PackedRow, SparseTargets]:
        """A row and the targets of its labelled slots.

        Raises:
            CorruptCacheError: the row is damaged; the message names the shard and the row.
        """
        return self.read_with_record(row)[:2]

    def read_with_record(self, row: int) -> tuple[PackedRow, SparseTargets, Record]:
        """The same, and the streams that it was made of."""
        with self._naming(row):
            record = self.record(row)
            return (*self.form.unpack(record), record)

    def read_tokens(self, row: int) -> PackedRow:
        """A row alone, whose targets are not decoded."""
        with self._naming(row):
            return self.form.tokens(self.record(row))

    @contextmanager
    def _naming(self, row: int) -> Iterator[None]:
        """Make of damage a sentence that names the row."""
        try:
            yield
        except _DAMAGE as error:
            what = f"{self.storage.path_of(self.name)}, row {row}: {error}{self.storage.damage_note}"
            raise CorruptCacheError(what) from None

    def count(self) -> Tally:
        """Read every row, and count."""
        tally = Tally()
        for found in self.storage.map(self.read_with_record, range(self.rows)):
            tally.add(*found)
        return tally

    def require(self, objects: list[dict[str, Any]], name: str) -> Any:
        """An object of the commit, opened; its size is the one committed."""
        promised = [x for x in objects if x["name"] == name]
        if len(promised) != 1:
            raise CorruptCacheError(f"{self.storage.path_of(name)} is not among the objects that were committed")
        opened, size = self.storage.open(name, promised[0]), promised[0]["bytes"]
        if opened.size != size:
            raise CorruptCacheError(f"{opened.name} has {opened.size} bytes, not the {size} that were committed")
        return opened
