"""Sources: the caches that a run learns from, each with its weight, checked against one another.

`--cache PATH` or `--cache PATH:WEIGHT`. Only a trailing `:NUMBER` is a weight, and a path or cache of that very name
wins over it, so `s3://bucket/c:8` names the cache of that name if there is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, IncompleteCacheError
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.places import open_place
from kdcache.student import ranks
from kdcache.student.config import TrainConfig


@dataclass(frozen=True)
class Source:
    """A cache of a run.

    Attributes:
        name: its folder or URL, without the weight.
        cache: the cache; only the shards that the run may read.
        weight: its share of the rows that are read, in any unit; None for in proportion to its rows.
        partial: whether it may lack shards.
    """

    name: str
    cache: Cache
    weight: float | None
    partial: bool

    def record(self) -> dict[str, Any]:
        """What must be the same when the run is gone on with."""
        shards = sorted(self.cache.commits) if self.partial else None
        return {"sha256": self.cache.manifest.sha256, "weight": self.weight, "shards": shards}


def open_sources(config: TrainConfig, standing: Sequence[dict[str, Any]] = ()) -> tuple[Source, ...]:
    """Open the caches of a run.

    Args:
        config: names them.
        standing: what the run said of them (`Source.record`) when it began; its shards are then read and no others.

    Raises:
        ConfigError: weights for some of them only, or caches that cannot be mixed.
        KdcacheError: as for `open_cache`.
    """
    sources = []
    for number, spelled in enumerate(config.cache):
        name, weight = split_weight(spelled)
        cache = _open(name, config)
        began = standing[number] if number < len(standing) else {}
        if began.get("shards") is not None and began.get("sha256") == cache.manifest.sha256:
            cache = cache.only(began["shards"])
        if config.partial:
            cache.require_objects()
        sources.append(Source(name, cache, weight, config.partial))
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("--cache PATH:WEIGHT needs a weight for every cache, or for none")
    for one, other in itertools.combinations(sources, 2):
        require_alike(one, other)
    return tuple(sources)


def agree(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The sources with the shards that the first process of the run saw; others may have looked a moment later."""
    commits = ranks.agree([source.cache.commits for source in sources])
    return tuple(
        dataclasses.replace(source, cache=Cache(source.cache.place, source.cache.manifest, seen))
        for source, seen in zip(sources, commits, strict=True)
    )


def require_targets(sources: Sequence[Source]) -> None:
    """Refuse caches of which no position carries a target.

    Raises:
        ConfigError: naming what the first was dumped with.
    """
    if not any(commit.positions for source in sources for commit in source.cache.commits.values()):
        first = sources[0]
        raise ConfigError(
            f"no position of {first.name} carries a target (--positions {first.cache.manifest.positions}), so there is "
            "nothing to distil; dump with a lower X, or train on its labels alone with --soft-weight 0"
        )


def weights(sources: Sequence[Source]) -> list[float] | None:
    """Their weights, if they have any."""
    given = [source.weight for source in sources if source.weight is not None]
    return given or None


def split_weight(spelled: str) -> tuple[str, float | None]:
    """`(path, weight)` of what follows `--cache`; no weight is None.

    Raises:
        ConfigError: a weight that is not above 0, or a URL that cannot be used.
    """
    name, _, tail = spelled.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spelled, None
    if len(name) < 2 or Path(spelled).exists() or open_place(spelled).size(NAME) is not None:  # C:8 is a path
        return spelled, None
    if not 0 < weight < math.inf:
        raise ConfigError(f"--cache {spelled} has a weight of {tail}, but it must be above 0")
    return name, weight


def _open(name: str, config: TrainConfig) -> Cache:
    # Of several caches, those in folders need no copies; of one, that is said.
    copy = config.local_copy if len(config.cache) == 1 or open_place(name).remote else None
    try:
        return open_cache(name, partial=config.partial, local_copy=copy, local_limit=config.local_limit)
    except IncompleteCacheError as error:
        raise IncompleteCacheError(f"{error}, or give --partial to train on the shards that are there") from None


def require_alike(one: Source, other: Source) -> None:
    """Refuse two caches whose rows cannot stand in one batch. How many entries they keep may differ.

    Raises:
        ConfigError: naming both, and what differs.
    """
    if one.cache.manifest.sha256 == other.cache.manifest.sha256:
        raise ConfigError(f"--cache {one.name} and {other.name} are one cache; name it once, with a greater weight")
    mine, theirs = _nature(one.cache.manifest), _nature(other.cache.manifest)
    differing = [f"{what} ({mine[what]} and {theirs[what]})" for what in mine if mine[what] != theirs[what]]
    if differing:
        raise ConfigError(f"--cache {one.name} and {other.name} cannot be mixed: they differ in {', '.join(differing)}")


def _nature(manifest: Manifest) -> dict[str, Any]:
    return {
        "tokenizer": manifest.tokenizer_sha256[:12],
        "vocab_size": manifest.vocab_size,
        "seq_len": manifest.seq_len,
        "isolate": manifest.isolate,
        "selection": manifest.selection["kind"],
        "temperatures": ",".join(f"{t:g}" for t in manifest.temperatures),
        "sample_temperature": manifest.selection.get("sample_temperature", 1.0),
    }
