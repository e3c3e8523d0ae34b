"""Commits: those of all shards of a cache, as columns.

A cache may have millions of shards, so its commits are one Arrow table and not as many Python objects: a `Commit` is
made from its row when somebody asks for it. Memory: some 600 bytes a shard of one object. A finished cache is opened
from `seal.arrow` (see `seal`), which holds this table; any other from its commits, one request each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.store.bad_records import MOST_REASON, UNPLAIN
from kdcache.store.commit import COUNTS, FOLDER, RULES, Commit, add_histograms, commit_name
from kdcache.store.manifest import Manifest
from kdcache.store.sealed_json import canonical, parse
from kdcache.store.shards import recorded_shards
from kdcache.store.storage import Storage

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BATCH = 1 << 14
_MOST_SHOWN = 1000
"""Bad records in a summary."""
_HASHES = ("tokens_sha256", "content_sha256")
_SUMS = ("entropy", "label_logprob")


def commit_schema(bins: pa.DataType | None = None) -> pa.Schema:
    """Columns of a table of commits.

    Args:
        bins: type of the numbers of histograms: any unsigned one.
    """
    sha256 = pa.binary(32)
    return pa.schema([
        _needed("shard", pa.int64()),
        *(_needed(name, pa.int64()) for name in COUNTS),
        pa.field("eos_labels", pa.int64()),
        _needed("dropped_by", _structs(reason=pa.string(), documents=pa.int64())),
        _needed("bad_records", _structs(document=pa.int64(), reason=pa.string())),
        *(_needed(name, sha256) for name in _HASHES),
        *(pa.field(name, pa.float64()) for name in _SUMS),
        pa.field("tail_mass", pa.list_(pa.float64())),
        _needed("objects", _structs(name=pa.string(), bytes=pa.int64(), sha256=sha256)),
        pa.field("entropy_histogram", pa.list_(_needed("item", bins or pa.uint64()))),
        _needed("compute", pa.string()),
    ])  # fmt: skip


def _structs(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(_needed("item", pa.struct([_needed(name, kind) for name, kind in fields.items()])))


def _needed(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


class Commits(Mapping[int, Commit]):
    """The commits of a cache by shard, in order of their numbers. It may be sent to another process.

    Args:
        table: one row a shard, numbers ascending; its content is checked already, see `require_sound`.
        manifest_sha256: of the cache that they belong to.
        sealed: whether they come from a seal, so that the objects were not looked for.
    """

    def __init__(self, table: pa.Table, manifest_sha256: str, sealed: bool = False) -> None:
        self.table, self.manifest_sha256, self.sealed = table, manifest_sha256, sealed
        self.shards = self.column("shard")

    def __reduce__(self) -> tuple[Any, ...]:
        return Commits, (self.table, self.manifest_sha256, self.sealed)

    @classmethod
    def of(cls, commits: Iterable[Commit], manifest_sha256: str) -> Commits:
        """From commits that are checked, in order of their numbers; they are taken in a few thousand at a time."""
        schema, waiting = commit_schema(), iter(commits)
        batches = []
        while some := list(itertools.islice(waiting, _BATCH)):
            batches.append(pa.RecordBatch.from_pylist([_to_fields(commit) for commit in some], schema=schema))
        return cls(pa.Table.from_batches(batches, schema=schema), manifest_sha256)

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.shards)

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, int | np.integer) and self._find(int(shard)) is not None

    def __getitem__(self, shard: int) -> Commit:
        """The commit of a shard.

        Raises:
            KeyError: it is not committed.
            CorruptCacheError: what the seal says of it is not what a commit can say.
        """
        at = self._find(shard)
        if at is None:
            raise KeyError(shard)
        commit = self._from_fields(self.table.slice(at, 1).to_pylist()[0])
        try:
            commit.require_sound()
        except ValueError as error:
            raise CorruptCacheError(f"the commit of shard {shard} in the seal does not describe it: {error}") from None
        return commit

    def _find(self, shard: int) -> int | None:
        at = int(np.searchsorted(self.shards, shard))
        return at if at < len(self.shards) and self.shards[at] == shard else None

    def _from_fields(self, fields: dict[str, Any]) -> Commit:
        sums = {name: fields.pop(name) for name in (*_SUMS, "tail_mass")}
        fields |= {name: fields[name].hex() for name in _HASHES}
        fields["dropped_by"] = {named["reason"]: named["documents"] for named in fields["dropped_by"]}
        objects = [{**described, "sha256": described["sha256"].hex()} for described in fields.pop("objects")]
        try:
            compute = parse(fields.pop("compute").encode())
        except ValueError as error:
            raise CorruptCacheError(f"compute of shard {fields['shard']} in the seal is not JSON: {error}") from None
        return Commit(
            **fields, objects=objects, sums=sums, compute=compute, manifest_sha256=self.manifest_sha256
        )  # fmt: skip

    def column(self, name: str) -> Ints:
        """`[shards]` one of `COUNTS`, or `shard`, of each shard."""
        found: Ints = self.table[name].to_numpy()
        return found

    def first_with_other_tokens(self, other: Commits) -> int | None:
        """The first shard whose tokens or pieces are not those of the same shard in `other`, which has all of these."""
        theirs = other.table["tokens_sha256"].take(np.searchsorted(other.shards, self.shards))
        same = pc.equal(self.table["tokens_sha256"], theirs).to_numpy()
        return None if same.all() else int(self.shards[np.flatnonzero(~same)[0]])

    def total(self, name: str) -> int:
        """The sum of a count over all shards, exactly."""
        return exact_total(self.column(name))

    @property
    def bytes(self) -> int:
        """Of all objects of all shards."""
        return exact_total(_flat(self.table["objects"], "bytes"))

    def sum(self, name: str, temperature: int = 0) -> float | None:
        """The sum of a quantity over all targets; None if it is unknown in any shard that has targets.

        Args:
            name: `entropy`, `label_logprob` or `tail_mass`.
            temperature: which of the manifest's, for `tail_mass`.
        """
        values = self.table[name].filter(pc.greater(self.table["positions"], 0))
        if name == "tail_mass":
            if values.null_count or (len(values) and pc.min(pc.list_value_length(values)).as_py() <= temperature):
                return None
            values = pc.list_element(values, temperature)
        return None if values.null_count else float(np.sum(values.to_numpy()))

    def histogram(self) -> list[int] | None:
        """Labelled positions by entropy, of all shards together; None if the entropy of any is unknown."""
        column = self.table["entropy_histogram"]
        if pc.any(pc.and_(pc.is_null(column), pc.greater(self.table["labels"], 0))).as_py():
            return None
        return add_histograms(_histograms(column))

    def bad_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Shard, and `document` and `reason`, of each bad record that a commit lists; in order."""
        table = self.table.select(["shard", "bad_records"])
        some = table.filter(pc.greater(pc.list_value_length(table["bad_records"]), 0))
        for batch in some.to_batches(max_chunksize=_MOST_SHOWN):
            for fields in batch.to_pylist():
                yield from ((fields["shard"], record) for record in fields["bad_records"])

    def of_documents(self) -> dict[str, Any]:
        """What became of the documents of all shards together, as the summaries of a cache say it.

        Returns:
            `documents`; `dropped`, how many became no rows, by reason, the most frequent first; `bad`, how many of
            these could not be used, and `bad_records`, the first thousand of them; `cut`, `truncated`; `eos_labels`,
            None if they are unknown in any shard that has labels.
        """
        dropped = self._dropped()
        ends = self.table["eos_labels"]
        unknown = pc.any(pc.and_(pc.is_null(ends), pc.greater(self.table["labels"], 0))).as_py()
        return {
            "documents": self.total("documents"),
            "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
            "bad": self.total("bad"),
            "bad_records": [record for _, record in itertools.islice(self.bad_records(), _MOST_SHOWN)],
            "cut": self.total("cut"),
            "truncated": self.total("truncated"),
            "eos_labels": None if unknown else exact_total(pc.fill_null(ends, 0).to_numpy()),
        }

    def _dropped(self) -> dict[str, int]:
        """Documents that became no rows, by reason."""
        lists = self.table["dropped_by"]
        reasons, counts = _flat_column(lists, "reason").combine_chunks().dictionary_encode(), _flat(lists, "documents")
        order = np.argsort(reasons.indices.to_numpy(), kind="stable")
        named = reasons.dictionary.to_pylist()
        ends = np.cumsum(np.bincount(reasons.indices.to_numpy(), minlength=len(named)))
        return {
            reason: exact_total(part) for reason, part in zip(named, np.split(counts[order], ends)[:-1], strict=True)
        }

    def object_sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each object."""
        names, sizes = _flat_column(self.table["objects"], "name"), _flat(self.table["objects"], "bytes")
        return zip((name.as_py() for name in names), map(int, sizes), strict=True)

    def only(self, shards: Iterable[int]) -> Commits:
        """Those of some shards, all of them committed."""
        wanted = np.array(sorted(set(shards)), np.int64)
        return Commits(self.table.take(np.searchsorted(self.shards, wanted)), self.manifest_sha256, self.sealed)


def exact_total(values: Ints) -> int:
    """The sum of numbers from 0 to 2^63 - 1, which may exceed 63 bits."""
    return (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())


def require_sound(table: pa.Table, temperatures: int) -> None:
    """Check the numbers of a table of commits as `Commit.require_sound` does, for all shards at once.

    The names of objects are left to whoever asks for a commit.

    Args:
        table: of `commit_schema`, valid Arrow.
        temperatures: of the manifest.

    Raises:
        ValueError: naming the first shard that no commit can describe.
    """
    numbers: dict[str, Any] = {name: table[name].to_numpy() for name in COUNTS}
    objects, histograms, tails = table["objects"], table["entropy_histogram"], table["tail_mass"]
    dropped_by, bad = table["dropped_by"], table["bad_records"]
    sizes, left_out, documents = _flat(objects, "bytes"), _flat(dropped_by, "documents"), _flat(bad, "document")
    for name, values in {**numbers, "bytes": sizes, "dropped_by": left_out, "bad_records": documents}.items():
        if (values < 0).any():
            raise ValueError(f"a count of {name} is below 0")
    for name in _SUMS:
        if pc.any(pc.is_nan(table[name])).as_py():
            raise ValueError(f"a sum of {name} is not a number")
        numbers[name] = table[name].to_numpy(zero_copy_only=False) if len(table) else np.zeros(0)
    counts = _flat(histograms)
    if any(int(values.max(initial=0)) >= 1 << 55 for values in (counts, sizes, left_out)):
        raise ValueError("it claims more than 2^55 positions, bytes or documents")
    if (left_out == 0).any():
        raise ValueError("it names a reason for no document")
    _require_reasons(_flat_column(dropped_by, "reason"), _flat_column(bad, "reason"))
    _require_rising(bad, documents)
    numbers |= {
        "bytes": _by_row(objects, sizes),
        "named": _by_row(dropped_by, left_out),
        "listed": pc.list_value_length(bad).to_numpy(),
        "eos_labels": table["eos_labels"].to_numpy(zero_copy_only=False) if len(table) else np.zeros(0),
        "bins": pc.fill_null(pc.list_value_length(histograms), 0).to_numpy(),
        "counted": np.where(histograms.is_null().to_numpy(), numbers["labels"], _by_row(histograms, counts)),
    }
    if len(objects) and (pc.list_value_length(objects).to_numpy() < 1).any():
        raise ValueError("a shard has no object")
    known = tails.drop_null()
    if len(known) and (pc.list_value_length(known).to_numpy() != temperatures).any():
        raise ValueError(f"its sums of tail mass are not of {temperatures} temperature(s)")
    if pc.any(pc.is_nan(pc.list_flatten(tails))).as_py():
        raise ValueError("a sum of tail mass is not a number")
    for at in range(temperatures):
        column = (
            pc.list_element(tails, at).to_numpy(zero_copy_only=False) if len(known) else np.full(len(table), np.nan)
        )
        for wrong, words in RULES:
            bad = np.flatnonzero(wrong({**numbers, "tail": column}))
            if len(bad):
                first = {name: values[bad[0]].item() for name, values in {**numbers, "tail": column}.items()}
                raise ValueError(f"of shard {table['shard'][int(bad[0])]}, {words.format(**first)}")


def _require_reasons(*columns: pa.ChunkedArray) -> None:
    """Check reasons as `bad_records.require_reason` does."""
    for column in columns:
        reasons = pc.unique(column)  # most shards say the same
        lengths = pc.utf8_length(reasons).to_numpy()
        unplain = pc.any(pc.match_substring_regex(reasons, UNPLAIN)).as_py()
        if unplain or (lengths < 1).any() or (lengths > MOST_REASON).any():
            raise ValueError(f"a reason is not one line of 1 to {MOST_REASON} characters")


def _require_rising(lists: pa.ChunkedArray, values: Ints) -> None:
    """Check that the numbers of bad records rise inside each list."""
    rises = np.diff(values) > 0
    ends = np.cumsum(pc.list_value_length(lists).to_numpy(), dtype=np.int64)
    rises[ends[(ends > 0) & (ends < len(values))] - 1] = True  # from the last of a shard to the first of the next
    if not rises.all():
        raise ValueError("the numbers of bad records do not rise")


def _flat_column(lists: pa.ChunkedArray, field: str | None = None) -> pa.ChunkedArray:
    values = pc.list_flatten(lists)
    return values if field is None else pc.struct_field(values, field)


def _flat(lists: pa.ChunkedArray, field: str | None = None) -> NDArray[Any]:
    """`[sum of lengths]` the numbers of all lists of a column, or of one field of their structs."""
    found: NDArray[Any] = _flat_column(lists, field).to_numpy()
    return found


def _by_row(lists: pa.ChunkedArray, values: NDArray[Any]) -> Ints:
    """`[rows]` the sum of each list's values, which together follow the lists; 0 for an empty one."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    starts, some = np.cumsum(lengths, dtype=np.int64) - lengths, lengths > 0
    found = np.zeros(len(lengths), np.int64)
    if some.any():  # modulo 2^64
        found[some] = np.add.reduceat(values, starts[some], dtype=np.uint64).astype(np.int64)
    return found


def _histograms(column: pa.ChunkedArray) -> Iterator[list[int]]:
    """The sum of those histograms of each chunk of a column that have equally many bins."""
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy()
        values, starts = pc.list_flatten(chunk).to_numpy(), np.cumsum(lengths, dtype=np.int64) - lengths
        for bins in np.unique(lengths[lengths > 0]):
            some = values[starts[lengths == bins][:, np.newaxis] + np.arange(bins)].astype(np.uint64)
            highs, lows = (some >> np.uint64(32)).sum(0), (some & np.uint64(0xFFFFFFFF)).sum(0)
            yield [(int(high) << 32) + int(low) for high, low in zip(highs, lows, strict=True)]


def _to_fields(commit: Commit) -> dict[str, Any]:
    same = ("shard", *COUNTS, "eos_labels", "bad_records", "entropy_histogram")
    fields = {name: getattr(commit, name) for name in same}
    fields |= {name: bytes.fromhex(getattr(commit, name)) for name in _HASHES}
    objects = [{**described, "sha256": bytes.fromhex(described["sha256"])} for described in commit.objects]
    fields["dropped_by"] = [{"reason": r, "documents": n} for r, n in sorted(commit.dropped_by.items())]
    return {**fields, **commit.sums, "objects": objects, "compute": canonical(commit.compute).decode()}


def committed(storage: Storage, manifest: Manifest) -> list[int]:
    """The shards that have a commit, in order; the commits themselves are not read."""
    return recorded_shards(storage.names(FOLDER), FOLDER, manifest.shards)


def read_commits(storage: Storage, manifest: Manifest, shards: Sequence[int] | None = None) -> Commits:
    """The commits themselves, whether or not the cache is sealed.

    Args:
        storage: where the cache is.
        manifest: of the cache.
        shards: those to read; None for all that are committed.

    Raises:
        CorruptCacheError: one is damaged, or of another shard or cache.
    """
    temperatures = len(manifest.temperatures)

    def read(shard: int) -> Commit | None:
        commit = Commit.read(storage, shard, manifest.sha256)
        mass = None if commit is None else commit.sums["tail_mass"]
        if mass is not None and len(mass) != temperatures:
            raise CorruptCacheError(
                f"{storage.path_of(commit_name(shard))} does not describe a shard: its sums of tail mass are not of "
                f"{temperatures} temperature(s)"
            )
        return commit

    wanted = committed(storage, manifest) if shards is None else sorted(shards)
    found = storage.map(read, wanted)
    return Commits.of((commit for commit in found if commit is not None), manifest.sha256)
