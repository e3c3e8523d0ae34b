"""Reuse: what other caches hold of the same teacher is copied, so that it need not be computed again.

The unit is a context: what the teacher sees together, a piece of a document, or a whole row where rows are not
isolated. One that has the same tokens in a committed shard of another cache, behind the same context of the teacher's,
with targets at the same labelled slots or more, has the same targets there; they are taken over as they are stored, and
nothing is rounded a second time. That both caches store alike is checked first: teacher, tokenizer, isolation,
selection, positions, seed, temperatures, precision, extras. Rows, packing and shards need not be alike.

Cost: an index of each cache (`context_index`), and one read of each row that something is copied from while it is among
those that were used last. Memory: these rows, 256 MiB of them.

Shapes: C contexts of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.corpus.packing import PackedRows
from kdcache.errors import CacheError, CacheMismatchError, ConfigError, one_line
from kdcache.known import Known
from kdcache.prefixes import Prefix
from kdcache.rows import PackedRow, RowSpec, labelled_tokens
from kdcache.store.manifest import Manifest
from kdcache.store.row_format import Part, Record, RowFormat
from kdcache.store.sealed_json import canonical, short
from kdcache.store.storage import LastUsed, Storage
from kdcache.targets import SparseTargets
from kdcache.teacher.context_index import ContextIndex, content_keys, open_index

_MOST_BYTES = 256 << 20
"""Of rows that are kept because their other contexts may be asked for soon."""

_SAME = {
    "teacher_sha256": "it is of another teacher, whose weights or configuration differ",
    "tokenizer_sha256": "it is of another tokenizer or chat template",
    "vocab_size": "its vocabulary has {theirs} tokens, not {mine}",
    "isolate": "its rows are isolated: {theirs}, those of this dump: {mine}",
    "positions": "its positions are {theirs}, not {mine}",
    "seed": "its draws have the seed {theirs}, not {mine}",
    "temperatures": "its temperatures are {theirs}, not {mine}",
    "precision": "its precision is {theirs}, not {mine}",
    "selection": "its selection is {theirs}, not {mine}",
}
"""What must be equal, and what to say where it is not."""

_MOST_COMPUTES, _MOST_COMPUTE = 16, 4096
"""How many ways to compute a commit names, and the bytes of one that are not too many."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where the contexts of a shard are.

    Attributes:
        places: of each row `[C, 4]`: index of a cache, its shard, the row there, and the context in that; -1 where it
            is nowhere.
        documents: how many documents of the shard have no context that is nowhere.
        same_order: of each cache, whether it stores ids in the order of the one that is made.
    """

    places: Sequence[NDArray[np.int64]]
    documents: int
    same_order: Sequence[bool]

    @cached_property
    def known(self) -> list[NDArray[np.bool_]]:
        """Of each row, which contexts are somewhere."""
        return [places[:, 0] >= 0 for places in self.places]

    @property
    def nothing(self) -> bool:
        """Whether no context is anywhere."""
        return not any(known.any() for known in self.known)

    @property
    def everything(self) -> bool:
        """Whether all are."""
        return all(known.all() for known in self.known)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """The caches and shards in which they are."""
        found = np.concatenate([np.zeros((0, 2), np.int64), *(places[places[:, 0] >= 0, :2] for places in self.places)])
        return [(int(cache), int(shard)) for cache, shard in np.unique(found, axis=0)]


class Reuse:
    """The caches that a dump copies from, in order: what several hold is taken from the first.

    Args:
        caches: open, complete or not.
        manifest: of the cache that is made, or as far as it is known before a pilot.
        storage: where that is.

    Raises:
        CacheMismatchError: one of them stores other targets, or stores them otherwise; what differs is named.
        ConfigError: one of them is the cache that is made.
    """

    def __init__(self, caches: Sequence[Cache], manifest: Manifest, storage: Storage) -> None:
        self._caches = caches
        if any(str(cache.storage) == str(storage) for cache in caches):
            raise ConfigError(f"reuse names {storage}, which is the cache that is made")
        manifest = self.complete(manifest)
        for cache in caches:
            _require_alike(cache, manifest)
        extras = sum(4 * spec.width for spec in manifest.extra_specs.values())
        row = max(cache.manifest.seq_len for cache in caches) * (20 * manifest.width + extras + 64)
        self._most_rows = min(max(1, _MOST_BYTES // row), 1 << 10)
        self._rows: LastUsed[_Source] = LastUsed(self._most_rows)

    @property
    def known(self) -> Known:
        """What the targets know that are copied."""
        return self._caches[0].manifest.known

    def require_known(self, known: Known) -> None:
        """Refuse caches whose targets know other things than those of this dump.

        Raises:
            CacheMismatchError: naming the first.
        """
        for cache in self._caches:
            if cache.manifest.known != known:
                raise CacheMismatchError(
                    f"{cache.storage} cannot be reused: its targets know other things of the teacher than those of "
                    "this dump do"
                )

    def complete(self, manifest: Manifest) -> Manifest:
        """A manifest with what a pilot would find, taken from the first cache."""
        first = self._caches[0].manifest
        alike = manifest.rule.needs_pilot and manifest.rule.same_but_for_pilot(first.rule)
        manifest = dataclasses.replace(
            manifest,
            selection=first.selection if alike else manifest.selection,
            id_order=manifest.id_order or first.id_order,
            origin={**manifest.origin, "reused": [cache.manifest.sha256 for cache in self._caches]},
        )
        if manifest.rule.needs_pilot:
            return manifest  # of another selection, which is refused
        return dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)

    @cached_property
    def _indices(self) -> list[ContextIndex]:
        return [open_index(cache) for cache in self._caches]

    def find(self, rows: PackedRows, manifest: Manifest) -> Found:
        """Where the contexts of a shard's rows are.

        Raises:
            CacheError: a cache is damaged, or its index cannot be written.
        """
        spec = manifest.row_spec
        exact, wider = [], []  # a context whose every slot is labelled has what any other one of its tokens wants
        for row in rows:
            exact.append(content_keys(row, labelled_tokens(row), spec))
            every = dataclasses.replace(row, supervised=None)
            wider.append(exact[-1] if row.supervised is None else content_keys(row, labelled_tokens(every), spec))
        ends = np.cumsum([len(keys) for keys in exact])
        places = np.full((int(ends[-1]) if len(ends) else 0, 4), -1, np.int64)
        try:
            for keys in (np.concatenate(exact), np.concatenate(wider)) if exact else ():
                for number, index in enumerate(self._indices):
                    missing = np.flatnonzero(places[:, 0] < 0)
                    found = index.find(keys[missing])
                    there = missing[found[:, 0] >= 0]
                    places[there, 0], places[there, 1:] = number, found[found[:, 0] >= 0]
        except OSError as error:
            raise CacheError(
                f"the index of what is reused cannot be kept: {one_line(error)}; let XDG_CACHE_HOME name a folder "
                "that can be written"
            ) from None
        by_row = np.split(places, ends[:-1]) if len(ends) else []
        return Found(
            places=by_row,
            documents=_whole_documents(rows, by_row),
            same_order=[cache.manifest.id_order == manifest.id_order for cache in self._caches],
        )

    def read_ahead(self, places: Iterable[NDArray[np.int64]]) -> None:
        """Read the rows of some contexts, several at once where the cache is far away."""
        wanted = np.unique(np.concatenate([part[part[:, 0] >= 0, :3] for part in places]), axis=0)
        for number, cache in enumerate(self._caches):
            rows = [(number, int(shard), int(row)) for which, shard, row in wanted if which == number]
            for _ in cache.storage.map(self._row, rows[: self._most_rows // len(self._caches)]):
                pass

    def part(self, place: NDArray[np.int64], tokens: NDArray[Any], labelled: NDArray[np.bool_], prefix: Prefix) -> Part:
        """What is stored of a context.

        Args:
            place: where it was found.
            tokens, labelled: `[n]` what it must be.
            prefix: what the teacher must have read in front of it.

        Raises:
            CorruptCacheError: the row is damaged.
            CacheError: something else is there.
        """
        number, shard, row, context = (int(x) for x in place)
        source = self._row((number, shard, row))
        found = source.parts[context] if context < len(source.parts) else None
        if found is None or not np.array_equal(found.tokens, tokens) or (labelled & ~found.labelled).any():
            raise self._wrong_index(number)
        if source.row.prefix(context).content != prefix.content:
            raise self._wrong_index(number)
        return found if np.array_equal(found.labelled, labelled) else found.labelled_at(labelled)

    def whole(self, places: NDArray[np.int64], row: PackedRow, form: RowFormat) -> tuple[SparseTargets, Record] | None:
        """Targets and record of a row that stands somewhere as it is, so that no context need be cut out of it.

        Args:
            places: `[C, 4]` where its contexts were found, in a cache that stores ids in the same order.
            row: what it must be.
            form: of the cache that is made.

        Returns:
            None where its contexts are not one row.
        """
        number, shard, place, _ = (int(x) for x in places[0])
        one = (places[:, :3] == places[0, :3]).all() and (places[:, 3] == np.arange(len(places))).all()
        if not one:
            return None
        source = self._row((number, shard, place))
        for name in ("tokens", "piece_lengths"):
            if not np.array_equal(getattr(source.row, name), getattr(row, name)):
                return None
        if not np.array_equal(labelled_tokens(source.row), labelled_tokens(row)):
            return None
        if any(source.row.prefix(i).content != row.prefix(i).content for i in range(len(places))):
            return None
        return source.targets, form.copy(source.record, row, source.targets)

    def _row(self, place: tuple[int, int, int]) -> _Source:
        number, shard, row = place
        cache = self._caches[number]
        if shard not in cache.commits or row >= cache.commits[shard].rows:
            raise self._wrong_index(number)

        def read() -> _Source:
            packed, targets, record = cache.shard(shard).read_with_record(row)
            return _Source(cache.manifest.row_format, cache.manifest.row_spec, packed, targets, record)

        return self._rows.get(place, read)

    def _wrong_index(self, number: int) -> CacheError:
        return CacheError(f"{self._indices[number].path} is not the index of {self._caches[number].storage}; delete it")

    def describe(self, found: Found, positions: int) -> dict[str, Any]:
        """What a commit records about what was copied: how much, from where, and how that was computed."""
        computes: list[dict[str, Any]] = []
        for cache, shard in found.shards:
            compute = dict(self._caches[cache].commits[shard].compute)
            earlier = compute.pop("reused", None)
            earlier = earlier.get("compute") if isinstance(earlier, dict) else None
            for each in (compute, *(earlier if isinstance(earlier, list) else ())):
                if each not in computes and len(canonical(each)) <= _MOST_COMPUTE:
                    computes.append(each)
        return {
            "positions": positions,
            "documents": found.documents,
            "caches": [self._caches[cache].manifest.sha256 for cache in sorted({cache for cache, _ in found.shards})],
            "compute": computes[:_MOST_COMPUTES],
        }


@dataclass(frozen=True)
class _Source:
    """A row of a cache that is reused."""

    form: RowFormat
    spec: RowSpec
    row: PackedRow
    targets: SparseTargets
    record: Record

    @cached_property
    def parts(self) -> list[Part]:
        """Its contexts."""
        return self.form.cut(self.record, self.row, self.targets, self.spec.contexts(self.row))


def _require_alike(cache: Cache, manifest: Manifest) -> None:
    """Refuse a cache whose stored targets are not what this dump would store.

    Raises:
        CacheMismatchError: naming what differs first.
    """
    mine, theirs = manifest.to_fields(), cache.manifest.to_fields()
    why = [
        words.format(theirs=short(theirs[name], 80), mine=short(mine[name], 80))
        for name, words in _SAME.items()
        if theirs[name] != mine[name]
    ]
    for name, spec in manifest.extra_specs.items():
        if cache.manifest.extra_specs.get(name) != spec:
            why.append(f"it does not hold the extra {name} in this precision")
    if why:
        raise CacheMismatchError(f"{cache.storage} cannot be reused: {why[0]}")


def _whole_documents(rows: PackedRows, places: Sequence[NDArray[np.int64]]) -> int:
    """Documents of which every context is somewhere."""
    every: set[int] = set()
    gone: set[int] = set()
    for row, found in zip(rows, places, strict=True):
        missing = found[:, 0] < 0
        own = len(found) == len(row.piece_documents)  # else the row is one context of all of them
        every.update(row.piece_documents.tolist())
        gone.update(row.piece_documents[missing if own else np.repeat(missing, len(row.piece_documents))].tolist())
    return len(every - gone)
