"""Caches of a run: those that a run learns from, each with its weight, checked against one another.

A cache is named as `PATH` or `PATH:WEIGHT`; so is each of `pool`, which adds the targets of other teachers for the same
rows. Only a trailing `:NUMBER` is a weight, and a path or cache of that very name wins over it, so `s3://bucket/c:8`
names the cache of that name if there is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.alignment import AlignedRows, Alignment
from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, IncompleteCacheError
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.open_storage import open_storage
from kdcache.student import distributed
from kdcache.student.config import TrainConfig
from kdcache.student.multi_teacher import PooledCache, RowReader, TeacherCache, require_lined_up


@dataclass(frozen=True)
class CacheSource:
    """A cache of a run.

    Attributes:
        name: its folder or URL, without the weight.
        cache: the cache; only the shards that the run may read.
        weight: its share of the rows that are read, in any unit; None for in proportion to its rows.
        partial: whether it may lack shards.
        partners: other teachers of the same rows.
        alignment: with the tokenizer of the student, if that is another one.
        longest: tokens of a context that such a student takes; None if any.
    """

    name: str
    cache: Cache
    weight: float | None
    partial: bool
    partners: tuple[TeacherCache, ...] = ()
    alignment: Alignment | None = None
    longest: int | None = None

    @property
    def teachers(self) -> tuple[TeacherCache, ...]:
        """The teachers whose targets are pooled, first that of `cache`; only that one if there is no pool."""
        return TeacherCache(self.name, self.cache, 1.0 if self.weight is None else self.weight), *self.partners

    @property
    def rows(self) -> RowReader:
        """What its rows are read from."""
        if self.alignment is not None:
            return AlignedRows(self.cache, self.alignment, self.longest)
        return PooledCache(self.teachers) if self.partners else self.cache

    @property
    def remote(self) -> bool:
        """Whether a read crosses a network."""
        return any(teacher.cache.storage.remote for teacher in self.teachers)

    def record(self) -> dict[str, Any]:
        """What must be the same for the run to be resumed."""
        shards = sorted(self.cache.commits) if self.partial else None
        pool = [{"sha256": each.cache.manifest.sha256, "weight": each.weight} for each in self.partners]
        found = {"sha256": self.cache.manifest.sha256, "weight": self.weight, "shards": shards}
        if self.alignment is not None:
            found["student_tokenizer"] = self.alignment.student.sha256
        return {**found, "pool": pool} if pool else found


def open_sources(config: TrainConfig, resumed: Sequence[dict[str, Any]] = ()) -> tuple[CacheSource, ...]:
    """Open the caches of a run.

    Args:
        config: names them.
        resumed: what a run that is resumed wrote down of them (`CacheSource.record`); only its shards are then read.

    Raises:
        ConfigError: weights for some of them only, or caches that cannot be mixed.
        KdcacheError: as for `open_cache`.
    """
    sources = []
    for number, spelled in enumerate(config.cache):
        name, weight = split_weight(spelled)
        cache = _open(name, config)
        recorded = resumed[number] if number < len(resumed) else {}
        if recorded.get("shards") is not None and recorded.get("sha256") == cache.manifest.sha256:
            cache = cache.only(recorded["shards"])
        if config.partial or cache.commits.sealed:  # before hours of training, not in the middle of them
            cache.require_objects()
        sources.append(CacheSource(name, cache, weight, config.partial))
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("cache PATH:WEIGHT needs a weight for every cache, or for none")
    for one, other in itertools.combinations(sources, 2):
        require_alike(one, other)
    return (_with_partners(sources[0], config),) if config.pool else tuple(sources)


def _with_partners(source: CacheSource, config: TrainConfig) -> CacheSource:
    """The source with the teachers that `pool` names, all over the same rows."""
    partners = []
    for spelled in config.pool:
        name, weight = split_weight(spelled, "pool")
        partners.append(TeacherCache(name, _open(name, config), 1.0 if weight is None else weight))
    for each in partners:
        if each.cache.commits.sealed and not config.partial:
            each.cache.require_objects()
    if config.partial:  # the shards that every teacher has
        shared = set(source.cache.commits).intersection(*(each.cache.commits for each in partners))
        source = dataclasses.replace(source, cache=source.cache.only(shared))
        partners = [dataclasses.replace(each, cache=each.cache.only(shared)) for each in partners]
        for each in partners:
            each.cache.require_objects()
    for number, each in enumerate(partners):
        for other in (source.teachers[0], *partners[:number]):
            require_lined_up(other, each)
    return dataclasses.replace(source, partners=tuple(partners))


def agree(sources: tuple[CacheSource, ...]) -> tuple[CacheSource, ...]:
    """The sources with the shards that the first process of the run found; others may have looked a moment later."""
    commits = distributed.agree([[teacher.cache.commits for teacher in source.teachers] for source in sources])
    found = []
    for source, found_there in zip(sources, commits, strict=True):
        first, *others = (
            dataclasses.replace(teacher, cache=Cache(teacher.cache.storage, teacher.cache.manifest, shards))
            for teacher, shards in zip(source.teachers, found_there, strict=True)
        )
        found.append(dataclasses.replace(source, cache=first.cache, partners=tuple(others)))
    return tuple(found)


def require_targets(sources: Sequence[CacheSource]) -> None:
    """Refuse caches of which no position carries a target.

    Raises:
        ConfigError: naming what the first was dumped with.
    """
    caches = [teacher.cache for source in sources for teacher in source.teachers]
    if not any(cache.commits.total("positions") for cache in caches):
        first = sources[0]
        raise ConfigError(
            f"no position of {first.name} carries a target (positions {first.cache.manifest.positions}), so there is "
            "nothing to distil; dump with a lower X, or train on its labels alone with soft_weight 0"
        )


def weights(sources: Sequence[CacheSource]) -> list[float] | None:
    """Their weights, if they have any."""
    given = [source.weight for source in sources if source.weight is not None]
    return given or None


def split_weight(spelled: str, field: str = "cache") -> tuple[str, float | None]:
    """`(path, weight)` of an item of `cache` or `pool`; no weight is None.

    Raises:
        ConfigError: a weight that is not above 0, or a URL that cannot be used.
    """
    name, _, tail = spelled.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spelled, None
    if len(name) < 2 or Path(spelled).exists() or open_storage(spelled).size(NAME) is not None:  # C:8 is a path
        return spelled, None
    if not 0 < weight < math.inf:
        raise ConfigError(f"{field} {spelled} has a weight of {tail}, but it must be above 0")
    return name, weight


def _open(name: str, config: TrainConfig) -> Cache:
    # Of several caches, those in folders need no copies; of one, that is said.
    copy = config.local_copy if len(config.cache) + len(config.pool) == 1 or open_storage(name).remote else None
    try:
        return open_cache(name, partial=config.partial, local_copy=copy, local_limit=config.local_limit)
    except IncompleteCacheError as error:
        raise IncompleteCacheError(f"{error}, or give partial=True to train on the shards that are there") from None


def require_alike(one: CacheSource, other: CacheSource) -> None:
    """Refuse two caches whose rows cannot be in one batch. How many entries they keep may differ.

    Raises:
        ConfigError: naming both, and what differs.
    """
    if one.cache.manifest.sha256 == other.cache.manifest.sha256:
        raise ConfigError(f"the caches {one.name} and {other.name} are one cache; name it once, with a greater weight")
    mine, theirs = _nature(one.cache.manifest), _nature(other.cache.manifest)
    differing = [f"{what} ({mine[what]} and {theirs[what]})" for what in mine if mine[what] != theirs[what]]
    if differing:
        raise ConfigError(
            f"the caches {one.name} and {other.name} cannot be mixed: they differ in {', '.join(differing)}"
        )


def _nature(manifest: Manifest) -> dict[str, Any]:
    return {
        "tokenizer": manifest.tokenizer_sha256[:12],
        "vocab_size": manifest.vocab_size,
        "seq_len": manifest.seq_len,
        "pack": manifest.pack,
        "isolate": manifest.isolate,
        "selection": manifest.rule.kind,
        "temperatures": ",".join(f"{t:g}" for t in manifest.temperatures),
        "sample_temperature": manifest.rule.target_temperature,
        "known entropy": manifest.known.entropy,
        "known log-probability of labels": manifest.known.label_logprob,
    }
