"""Shards: what every store does alike when it writes and reads the rows of one shard.

A store adds how a record becomes bytes and how a row is found again; counting, hashing, publishing and the
checks of a row's content are here, once.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.rows import PackedRow
from kdcache.store.row_format import Record, RowFormat
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

    Attributes:
        tally: of what is written so far.
        data: where it goes.
    """

    suffix: ClassVar[str]
    folder: ClassVar[bool]

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        self.storage, self.shard, self.form = storage, shard, form
        self.tally = Tally()
        self.data = storage.new_data(shard_stem(shard), self.suffix, self.folder)

    def write(self, row: PackedRow, targets: SparseTargets, record: Record | None = None) -> None:
        """Append a row and the targets of its labelled slots, in slot order; `record` if it is packed already."""
        record = record or self.form.pack(row, targets)
        self._append(record)
        self.tally.add(row, targets, record)

    @abstractmethod
    def _append(self, record: Record) -> None:
        """Write one more record."""

    @abstractmethod
    def _finish(self) -> list[dict[str, Any]]:
        """Write what comes last; the records of all objects."""

    @classmethod
    @abstractmethod
    def reader(cls) -> type[Shard]:
        """What reads these shards."""

    def publish(self) -> tuple[list[dict[str, Any]], bool]:
        """Make the data appear; returns its objects, and whether they are these.

        If data of that name exists without a commit, some writer stopped between the two, or is about to
        commit. It appeared whole, so if it holds these tokens it is as good as this and stays; if it is
        damaged it makes room. Of several writers that find it damaged one replaces it, and the others find
        what that one made.
        """
        objects = self._finish()
        if self.data.publish():
            return objects, True
        with self.storage.alone(FOLDER):
            while not self.data.publish():
                standing = self._standing()
                if standing == objects:
                    break
                if standing and self._adopt(standing):
                    return standing, False
                self.storage.delete(self.data.name)
        return objects, True

    def _standing(self) -> list[dict[str, Any]]:
        """What lies under the name of this shard; nothing if it cannot be read."""
        name = self.data.name
        try:
            names = self.storage.names(name) if self.folder else [name]
            digests = {name: self.storage.digest(name) for name in names}
            return [{"name": name, "bytes": size, "sha256": sha256} for name, (size, sha256) in digests.items()]
        except CacheError:
            return []

    def _adopt(self, standing: list[dict[str, Any]]) -> bool:
        """Whether standing data is sound and holds these tokens; its content is then what this shard has."""
        try:
            found = self.reader()(self.storage, self.shard, self.form, standing, self.tally.rows).count()
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
    """Reads one shard.

    Args:
        storage: where the cache lies.
        shard: its number.
        form: of its rows.
        objects: what its commit says of its objects.
        rows: how many it holds.

    Raises:
        CorruptCacheError: the objects are not the shard that its commit promises.
    """

    def __init__(self, storage: Storage, shard: int, form: RowFormat, objects: list[dict[str, Any]], rows: int) -> None:
        self.storage, self.shard, self.form, self.rows = storage, shard, form, rows
        self.name = self._open(objects)

    @abstractmethod
    def _open(self, objects: list[dict[str, Any]]) -> str:
        """Open the objects and check their outer form; the shard's name, for messages."""

    @abstractmethod
    def _record(self, row: int) -> Record:
        """The streams of a row, their seal checked, each no longer than a row's can be."""

    def read(self, row: int) -> tuple[PackedRow, SparseTargets]:
        """A row and the targets of its labelled slots.

        Raises:
            CorruptCacheError: the row is damaged; the message names the shard and the row.
        """
        return self.read_with_record(row)[:2]

    def read_with_record(self, row: int) -> tuple[PackedRow, SparseTargets, Record]:
        """The same, and the streams that it was made of."""
        try:
            record = self._record(row)
            return (*self.form.unpack(record), record)
        except _DAMAGE as error:
            what = f"{self.storage.where(self.name)}, row {row}: {error}{self.storage.damage_note}"
            raise CorruptCacheError(what) from None

    def count(self) -> Tally:
        """Read every row, and count."""
        tally = Tally()
        for found in self.storage.map(self.read_with_record, range(self.rows)):
            tally.add(*found)
        return tally

    def _require(self, objects: list[dict[str, Any]], name: str) -> Any:
        """An object of the commit, opened; its size is the one committed."""
        promised = [x for x in objects if x["name"] == name]
        if len(promised) != 1:
            raise CorruptCacheError(f"{self.storage.where(name)} is not among the objects that were committed")
        opened, size = self.storage.open(name, promised[0]), promised[0]["bytes"]
        if opened.size != size:
            raise CorruptCacheError(f"{opened.name} has {opened.size} bytes, not the {size} that were committed")
        return opened
