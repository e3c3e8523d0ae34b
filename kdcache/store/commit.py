"""Commit: the small record that makes a shard exist, written last and once only.

A commit carries what a summary needs: counts, a histogram of the teacher's entropy, and sums over the shard's targets.
So a summary of a cache reads no rows. The sums are of the targets before a codec rounds them; each is exact to one
rounding of float64 a row, and None where something of it is not known.

Bin i of the histogram counts positions with (i / 32)^2 <= H < ((i + 1) / 32)^2 nats: a thousandth of a nat wide at 0,
where most positions of a sure teacher lie, a sixteenth at 1 nat, a fifth at 10. Histograms of shards add up. A quantile
is found inside its bin by interpolation, so it is off by less than the width of the bin, whatever the distribution.

Nothing in a commit is believed before it is checked: types by `sealed_json`, names of objects here, and how counts and
sums must relate by `RULES`, which hold for the numbers of one commit and for columns of many alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.lazy_torch import torch
from kdcache.store.bad_records import MOST_LISTED, require_listable, require_reason
from kdcache.store.manifest import FORMAT
from kdcache.store.sealed_json import MOST_BYTES, parse, require_fields, seal, short
from kdcache.store.shard_record import read_shard_record
from kdcache.store.shards import record_name, shard_stem
from kdcache.store.storage import Storage, inside

MOST_BINS = 150
"""Bins of a histogram; the entropy of 2^31 equally likely tokens is in the last but one."""

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_BINS_A_ROOT = 32


def histogram(entropy: torch.Tensor | None) -> list[int]:
    """Positions in each bin, up to the last that has any; none where the entropy is unknown.

    Args:
        entropy: `[N]` nats, on the CPU.
    """
    if entropy is None:
        return []
    bins = (_BINS_A_ROOT * entropy.double().clamp(min=0).sqrt()).long().clamp(max=MOST_BINS - 1)
    return np.bincount(bins.numpy()).tolist() if len(bins) else []


def add_histograms(histograms: Iterable[Sequence[int]]) -> list[int]:
    """One histogram of several."""
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]


def quantiles(counts: Sequence[int]) -> dict[str, float] | None:
    """The entropy, nats, below which a share of the positions lies, by share; None where there is no position."""
    ends = list(itertools.accumulate(counts))
    if not ends or not ends[-1]:
        return None
    found = {}
    for level in LEVELS:
        wanted = level * ends[-1]
        i = next(i for i, end in enumerate(ends) if end >= wanted)
        low, high = (i / _BINS_A_ROOT) ** 2, ((i + 1) / _BINS_A_ROOT) ** 2
        found[f"{level:g}"] = low + (high - low) * (wanted - (ends[i] - counts[i])) / counts[i]
    return found


FOLDER = "commits"
_LEAST_ROW = 16
"""Bytes; a row has its offsets and its seal in any store. So a claim of rows is bounded by the bytes that are there."""
_MOST_ROWS = 1 << 32
_MOST_TOKENS = 1 << 50
_MOST_NATS = 22.0
"""More than the entropy of 2^31 equally likely tokens."""
_ROUNDING = 1e-3
"""What a float32 entropy, log p or mass may lie beyond its exact range; generous, for hostile numbers are far off."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Contents of `commits/00007.json`.

    Attributes:
        shard: the shard's own number.
        manifest_sha256: the cache that it belongs to.
        rows: rows of the shard.
        tokens, pieces: tokens of all rows, padding not counted, and the pieces that they lie in.
        labels, positions: labelled slots, and those of them that carry a target.
        entries: of all targets together.
        least_entries, most_entries: of one target; both 0 where there is no target.
        documents, dropped: documents in its range, and how many of them became no rows.
        dropped_by: these by reason; each counts once.
        bad: how many of them could not be used; the others were left out by a rule.
        bad_records: `{"document", "reason"}` of the bad ones in order of their numbers: all, or the first that fit.
        cut, truncated: documents that lie in several rows because they are longer than one, and documents of which only
            the beginning is there.
        eos_labels: labels that are the tokenizer's end of sequence; None where that is not known.
        objects: `{"name", "bytes", "sha256"}` of each file of the shard.
        tokens_sha256: of the token ids of its rows, the shape of the pieces included.
        content_sha256: of all streams of its rows, before compression: equal in every store.
        entropy_histogram: of the teacher, over all labelled positions; None if its entropy is unknown.
        sums: `entropy`, `label_logprob` and `tail_mass` of its targets; see `SumFields`.
        compute: dtype, device, threads and batch size that made it; bit-identity is promised for
            equal values of these, near-identity otherwise.
    """

    shard: int
    manifest_sha256: str
    rows: int
    tokens: int
    pieces: int
    labels: int
    positions: int
    entries: int
    least_entries: int
    most_entries: int
    documents: int
    dropped: int
    dropped_by: dict[str, int]
    bad: int
    bad_records: list[dict[str, Any]]
    cut: int
    truncated: int
    eos_labels: int | None
    objects: list[dict[str, Any]]
    tokens_sha256: str
    content_sha256: str
    entropy_histogram: list[int] | None
    sums: dict[str, Any]
    compute: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of all its objects."""
        return sum(data["bytes"] for data in self.objects)

    def write(self, storage: Storage) -> bool:
        """Commit the shard; False if another worker did so first."""
        return storage.create(commit_name(self.shard), seal({"format": FORMAT, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, storage: Storage, shard: int, manifest_sha256: str) -> Self | None:
        """The commit of a shard, or None if it is not committed.

        Raises:
            CorruptCacheError: damaged, or the commit of another shard or cache.
        """
        return read_shard_record(cls, storage, commit_name(shard), MOST_BYTES, shard, manifest_sha256)

    def require_readable(self) -> None:
        """Refuse to write what no reader would accept: a commit is written once and never again.

        Raises:
            ConfigError: a field of another type, values that are not plain JSON, or numbers that contradict each other.
        """
        try:
            fields = parse(seal({"format": FORMAT, **dataclasses.asdict(self)}))
            del fields["format"], fields["checksum"]
            require_fields(fields, type(self))
            self.require_sound()
        except (TypeError, ValueError, OverflowError, CorruptCacheError) as error:
            raise ConfigError(f"shard {self.shard} cannot be committed: {error}") from None

    def require_sound(self) -> None:
        """Check what the types of its fields do not say.

        Raises:
            ValueError: names that are not of this shard, or numbers that contradict each other.
            CorruptCacheError: a name that leads out of the cache.
        """
        stem = shard_stem(self.shard)
        for data in self.objects:
            require_fields(data, _Object)
            if not inside(data["name"]).startswith((f"{stem}.", f"{stem}-")):
                raise ValueError(f"it names an object {short(data['name'])} that is not of shard {self.shard}")
        if not self.objects or len({data["name"] for data in self.objects}) != len(self.objects):
            raise ValueError("it names no object, or one twice")
        for reason, count in self.dropped_by.items():
            require_reason(reason)
            if not count:
                raise ValueError(f"it names the reason {short(reason)} for no document")
        require_listable(self.bad_records)
        require_fields(self.sums, SumFields)
        numbers = {name: getattr(self, name) for name in COUNTS}
        histogram = self.entropy_histogram
        numbers |= {
            "bytes": self.bytes,
            "named": sum(self.dropped_by.values()),
            "listed": len(self.bad_records),
            "eos_labels": _number(self.eos_labels),
            "bins": 0 if histogram is None else len(histogram),
            "counted": self.labels if histogram is None else sum(histogram),
            "entropy": _number(self.sums["entropy"]),
            "label_logprob": _number(self.sums["label_logprob"]),
        }
        mass = self.sums["tail_mass"]
        for tail in (math.nan,) if mass is None else map(_number, mass):
            for wrong, words in RULES:
                if wrong({**numbers, "tail": tail}):
                    raise ValueError(words.format(**{**numbers, "tail": tail}))


COUNTS = (
    "rows", "tokens", "pieces", "labels", "positions", "entries", "least_entries", "most_entries", "documents",
    "dropped", "bad", "cut", "truncated",
)  # fmt: skip
"""The fields of a commit that are plain counts."""


@dataclass(frozen=True, kw_only=True)
class SumFields:
    """The fields of `sums`, over the positions that carry a target; None for what is unknown.

    Attributes:
        entropy: of the teacher's distribution, nats.
        label_logprob: log p of the true next token, nats.
        tail_mass: the mass at T of everything not kept, one sum for each T of the manifest.
    """

    entropy: float | None
    label_logprob: float | None
    tail_mass: list[float | None] | None


@dataclass(frozen=True, kw_only=True)
class _Object:
    """The fields of an entry of `objects`."""

    name: str
    bytes: int
    sha256: str


RULES: tuple[tuple[Callable[[Mapping[str, Any]], Any], str], ...] = (
    (lambda c: c["rows"] >= _MOST_ROWS, "it claims {rows} rows in {bytes} bytes"),
    (lambda c: c["rows"] * _LEAST_ROW > c["bytes"], "it claims {rows} rows in {bytes} bytes"),
    (lambda c: c["tokens"] >= _MOST_TOKENS, "it claims {tokens} tokens"),
    (lambda c: c["dropped"] > c["documents"], "it claims {dropped} dropped of {documents} documents"),
    (lambda c: c["named"] != c["dropped"], "its reasons are of {named} documents, but it claims {dropped} dropped"),
    (lambda c: c["bad"] > c["dropped"], "it claims {bad} bad records among {dropped} dropped documents"),
    (
        lambda c: (c["listed"] > c["bad"]) | (c["listed"] > MOST_LISTED),
        "it lists {listed} of {bad} bad records, of which it may list 10000",
    ),
    (
        lambda c: (
            (c["cut"] > c["documents"] - c["dropped"])
            | (c["truncated"] > c["documents"] - c["dropped"] - c["cut"])  # a sum might exceed 63 bits
        ),
        "it claims {cut} cut and {truncated} truncated of {documents} documents, {dropped} of them dropped",
    ),
    (lambda c: c["tokens"] < c["rows"], "it claims {tokens} tokens in {rows} rows"),
    (lambda c: (c["pieces"] < c["rows"]) | (c["pieces"] > c["tokens"]), "it claims {pieces} pieces of {tokens} tokens"),
    (lambda c: c["labels"] > c["tokens"], "it claims {labels} labels among {tokens} tokens"),
    (
        lambda c: (c["eos_labels"] < 0) | (c["eos_labels"] > c["labels"]),
        "it claims {eos_labels:.0f} ends of sequence among {labels} labels",
    ),
    (lambda c: c["positions"] > c["labels"], "it claims {positions} targets for {labels} labels"),
    (lambda c: c["bins"] > MOST_BINS, "its histogram has {bins} bins, above the limit of 150"),
    (lambda c: c["counted"] != c["labels"], "its histogram counts {counted} entropies of {labels} labels"),
    (
        lambda c: (
            (c["entries"] < 1.0 * c["positions"] * c["least_entries"] * (1 - 1e-9))
            | (c["entries"] > 1.0 * c["positions"] * c["most_entries"] * (1 + 1e-9))
        ),
        "it claims {entries} entries at {positions} positions of {least_entries} to {most_entries} each",
    ),
    (
        lambda c: (c["entropy"] < -_ROUNDING * c["positions"]) | (c["entropy"] > _MOST_NATS * c["positions"]),
        "it claims entropies of {entropy} nats at {positions} positions",
    ),
    (
        lambda c: (c["label_logprob"] > _ROUNDING * c["positions"]) | (c["label_logprob"] == -math.inf),
        "it claims {label_logprob} nats of label log p at {positions} positions",
    ),
    (
        lambda c: (c["tail"] < 0) | (c["tail"] > (1 + _ROUNDING) * c["positions"]),
        "it claims a tail mass of {tail} at {positions} positions",
    ),
)
"""What no commit may say, and the words for it. Each takes the numbers of one commit or numpy columns of many; an
unknown sum is NaN, which no rule refuses."""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def commit_name(shard: int) -> str:
    """The object that holds the commit of a shard."""
    return record_name(FOLDER, shard)
