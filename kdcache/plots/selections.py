"""Selections: bytes a position against the squared error, for each selection that can be made of a cache.

Bytes are measured: rows of the cache are written with each selection into a cache of their own, in the same store and
precision, and the bytes of these shards are counted, tokens included, extras, manifest and commits not. Errors are
computed (`squared_error.py`): exact where the cache holds all of p, bounds where it has a tail, and of drawn targets a
bound or an estimate; each line says which. What needs probabilities that the cache does not hold is left out, by name.
Cost: each row is narrowed and encoded once for each selection. Memory: one row.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache_writer import CacheWriter, NewShard
from kdcache.convert import id_order_of, narrowed_manifest, narrowed_row
from kdcache.drawing import COLOURS, finish
from kdcache.errors import CacheError, ConfigError
from kdcache.plots.plot import Plot, Progress
from kdcache.plots.read_rows import read_packed_spread
from kdcache.plots.squared_error import Between, KnownProbabilities, fewer_draws, redrawn_ipps
from kdcache.rows import IGNORE, PackedRow
from kdcache.selection import Selection, select
from kdcache.selection.ipps import Ipps
from kdcache.selection.sample import Sample
from kdcache.selection.topk import TopK
from kdcache.selection.topp import TopP
from kdcache.store.commit import Commit
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.targets import SparseTargets

_MOST_ENTRIES = 256
_MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
_SAMPLED: tuple[tuple[type[Selection], Callable[[int], Selection], str, tuple[int, ...]], ...] = (
    (Ipps, lambda n: Ipps(k=n), "k", (4, 8, 12, 16, 32, 64)),
    (Sample, lambda n: Sample(draws=n), "draws", (8, 16, 32, 64, 128)),
)
"""The kinds that are drawn: how one of a size is made, what that size is called, and those that are tried."""
_EMPTY, _FULL = 0, 1
"""Shards of a trial: one without rows, whose bytes are subtracted, and one with them."""


def selections(cache: Cache, rows: int, on_progress: Progress | None = None) -> Plot:
    """Measure rows with each selection.

    Raises:
        ConfigError: rows below 1, or none with a target.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}, but must be at least 1")
    found, left_out = _candidates(cache)
    with tempfile.TemporaryDirectory(prefix="kdcache-plot-") as scratch:
        positions = _measure(cache, rows, found, Path(scratch), on_progress)
        if not positions:
            raise ConfigError("there is no position with a target in these rows")
        points = [one.point(positions) for one in found]
    manifest = cache.manifest
    numbers = {
        "rows": min(rows, len(cache)), "of_rows": len(cache), "positions": positions,
        "store": manifest.store, "precision": manifest.precision, "stored": manifest.selection,
        "points": points, "left_out": left_out,
    }  # fmt: skip
    return Plot(name="selections", numbers=numbers, draw=_draw, size=(6.8, 5.0))


class _Candidate:
    """A selection that is tried, and what is known of it so far.

    Attributes:
        name: what varies along its line, such as `k=8`.
        error: what its error is: `exact`, `bounds`, or `estimate`.
    """

    def __init__(self, rule: Selection, manifest: Manifest, name: str, error: str) -> None:
        self.rule, self.manifest, self.name, self.error = rule, manifest, name, error
        self.low = self.high = 0.0
        self.entries = 0
        self.writer: CacheWriter | None = None
        self.shard: NewShard | None = None

    def begin(self, folder: Path, stack: ExitStack) -> None:
        """Open a shard for its rows."""
        small = dataclasses.replace(
            self.manifest, shards=2, plan={}, documents=max(2, self.manifest.documents), tokenizer_files={}
        )
        self.writer = CacheWriter.create(open_storage(folder), small, {})
        with self.writer.shard(_EMPTY):
            pass
        self.shard = stack.enter_context(self.writer.shard(_FULL))

    def add(self, row: PackedRow, targets: SparseTargets, error: Between) -> None:
        """Write a row, and count its errors."""
        assert self.shard is not None
        self.shard.write_row(row, targets, record=self.manifest.row_format.pack(row, targets))
        self.entries += int(targets.count.sum())
        self.low += float(error[0].sum())
        self.high += float(error[1].sum())

    def point(self, positions: int) -> dict[str, Any]:
        """What was found, for one position in the mean."""
        assert self.writer is not None
        sizes = []
        for number in (_EMPTY, _FULL):
            commit = Commit.read(self.writer.storage, number, self.writer.manifest.sha256)
            if commit is None:
                raise CacheError(f"{self.writer.storage} has lost shard {number}")
            sizes.append(commit.bytes)
        return {
            "kind": self.rule.kind, "name": self.name, "selection": self.rule.to_fields(),
            "entries_per_position": self.entries / positions,
            "bytes_per_position": (sizes[_FULL] - sizes[_EMPTY]) / positions,
            "squared_error": {"low": self.low / positions, "high": self.high / positions, "is": self.error},
        }  # fmt: skip


def _candidates(cache: Cache) -> tuple[list[_Candidate], list[dict[str, str]]]:
    """The selections that can be tried, and why the others cannot."""
    old = dataclasses.replace(cache.manifest, extras={})
    rule = old.rule
    every = rule.form.every_id
    error = "exact" if every else "estimate" if isinstance(rule, Sample) else "bounds"
    if rule.sampled and (rule.labelled or not isinstance(rule, Ipps | Sample) or not _counted(rule)):
        raise ConfigError(
            f"the error of kind {rule.kind}, settings {rule.to_fields()}, cannot be told from its entries"
        )
    found: list[_Candidate] = []
    left_out: list[dict[str, str]] = []
    order: tuple[int, ...] | None = None
    for new, name in _narrower(rule, old.width):
        manifest = narrowed_manifest(old, new)
        if manifest.codec.orders_ids and not manifest.id_order:
            order = id_order_of(cache, manifest) if order is None else order
            manifest = dataclasses.replace(manifest, id_order=order)
        found.append(_Candidate(new, manifest, name, error))
    for kind, make, setting, sizes in _SAMPLED:
        if every:
            found += [_drawn(old, make(n), f"{setting}={n}") for n in sizes if n <= old.width]
        elif not isinstance(rule, kind):
            left_out.append({"kind": kind.kind, "why": _why_not(rule, kind)})
    if rule.sampled:
        left_out += [{"kind": kind.kind, "why": _why_not(rule, kind)} for kind in (TopK, TopP)]
    elif isinstance(rule, TopP):
        left_out.append({"kind": TopK.kind, "why": "a position of this cache may hold fewer than k entries"})
    return found, left_out


def _narrower(rule: Selection, width: int) -> list[tuple[Selection, str]]:
    """The stored selection, and those that narrowing makes of it, each with what varies."""
    every, size = rule.form.every_id, "draws" if isinstance(rule, Sample) else "k"
    most = min(getattr(rule, size, width), width) if size == "k" else getattr(rule, size)
    top = min(most, _MOST_ENTRIES) if every else most
    if isinstance(rule, TopP):
        masses = [mass for mass in _MASSES if mass < rule.top_p]
        return [
            *((dataclasses.replace(rule, top_p=mass), f"p={mass:g}") for mass in masses),
            (rule, f"p={rule.top_p:g}"),
        ]
    ks = sorted({*(1 << i for i in range(1, top.bit_length())), top})
    try:
        found = [(rule if k == most and not every else rule.fewer(k), f"{size}={k:,}") for k in ks if k <= most]
    except ConfigError:  # a kind of a plug-in that cannot be made fewer
        found = [(rule, "as stored")]
    if not rule.sampled and not rule.form.ragged:
        found += [(TopP(top_p=mass, k=top, force_label=rule.labelled), f"p={mass:g}") for mass in _MASSES]
    return [*found, (rule, rule.kind)] if every else found


def _counted(rule: Selection) -> bool:
    """Whether the weights of draws are counts, of at least two."""
    return not isinstance(rule, Sample) or (rule.proposal_power == 1 and rule.draws > 1)


def _why_not(rule: Selection, kind: type[Selection]) -> str:
    if rule.sampled:
        return f"{kind.kind} cannot be made of the draws of kind {rule.kind} that this cache holds"
    return (
        f"{kind.kind} draws from ids whose probabilities this cache does not hold; `kdcache plan` measures it with the "
        "teacher"
    )


def _drawn(old: Manifest, rule: Selection, name: str) -> _Candidate:
    """A sampled selection, drawn from all of p."""
    new = dataclasses.replace(
        old, selection=rule.to_fields(), known=rule.known(old.temperatures), id_order=(),
        precision=old.precision,
    )  # fmt: skip
    return _Candidate(rule, dataclasses.replace(new, error_bound=new.codec.error_bound), name, "exact")


def _measure(cache: Cache, rows: int, found: list[_Candidate], folder: Path, on_progress: Progress | None) -> int:
    """Write rows for every candidate; the positions that carry a target."""
    positions = 0
    with ExitStack() as stack:
        for number, candidate in enumerate(found):
            candidate.begin(folder / str(number), stack)
        for index, row, targets in read_packed_spread(cache, rows, on_progress):
            plain = dataclasses.replace(row, extras={})
            positions += int((targets.count > 0).sum())
            for candidate, made, error in _made(cache, index, plain, targets, found):
                candidate.add(plain, made, error)
    return positions


def _made(
    cache: Cache, index: int, row: PackedRow, targets: SparseTargets, found: list[_Candidate]
) -> list[tuple[_Candidate, SparseTargets, Between]]:
    """The targets `[N]` of a row for each candidate, and the error of each position with a target."""
    old, (shard, number) = cache.manifest, cache.locate(index)
    has = targets.count > 0
    known = None
    if not old.rule.sampled:
        known = KnownProbabilities.of(targets[has], old.vocab_size, old.rule.labelled)
    made = []
    for one in found:
        if one.rule == old.rule:
            new = targets
        elif one.rule.sampled and known is not None:
            new = _draw_from(targets, has, row, one, shard, number)
        else:
            new = narrowed_row(row, targets, old, one.manifest, shard, number)
        made.append((one, new, _error(one.rule, new[has], targets[has], known, old.rule)))
    return made


def _error(
    rule: Selection, made: SparseTargets, stored: SparseTargets, known: KnownProbabilities | None, old: Selection
) -> Between:
    if known is not None:
        if isinstance(rule, Ipps):
            return known.ipps(rule.k)
        return known.sample(rule.draws) if isinstance(rule, Sample) else known.truncated(made)
    if isinstance(rule, Ipps):
        return redrawn_ipps(stored, None if rule == old else rule.k)
    assert isinstance(rule, Sample) and isinstance(old, Sample)
    return fewer_draws(stored, old.draws, rule.draws)


def _draw_from(
    targets: SparseTargets, has: torch.Tensor, row: PackedRow, one: _Candidate, shard: int, number: int
) -> SparseTargets:
    """Targets drawn from all of p, with the keys of their slots, as at a dump."""
    full = targets[has]
    logits = torch.zeros_like(full.logprobs).scatter_(-1, full.ids, full.logprobs.clamp(min=-1e4))
    labels = row.labels(one.manifest.seq_len)
    slots = np.flatnonzero(labels != IGNORE)[has.numpy()]
    keys = torch.tensor([[shard, number, int(slot)] for slot in slots], dtype=torch.int64).reshape(-1, 3)
    drawn = select(
        logits, one.rule, labels=torch.from_numpy(labels[slots]), temperatures=targets.temperatures,
        seed=one.manifest.seed, keys=keys,
    )  # fmt: skip
    drawn = dataclasses.replace(drawn, entropy=full.entropy, label_logprob=full.label_logprob)
    return drawn.spread(has.nonzero()[:, 0], len(targets.count))


def _draw(figure: Any, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    kinds = list(dict.fromkeys(point["kind"] for point in numbers["points"]))
    most = max(point["squared_error"]["high"] for point in numbers["points"])
    floor = _SHOWN * most if most > 0 else 1e-12
    for kind, colour in zip(kinds, COLOURS, strict=False):
        points = sorted(
            (p for p in numbers["points"] if p["kind"] == kind), key=lambda p: float(p["bytes_per_position"])
        )
        x = [p["bytes_per_position"] for p in points]
        low, high = ([max(p["squared_error"][end], floor) for p in points] for end in ("low", "high"))
        varies = points[0]["name"].partition("=")[0]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        name = kind if varies == kind else f"{kind}, by {varies}"
        label = _LEGEND[points[0]["squared_error"]["is"]].format(name)
        axes.plot(x, high, color=colour, marker="o", markersize=4, linewidth=1.7, label=label)
        _name_points(axes, points, x, high, numbers["stored"], colour)
    axes.set(xscale="log", yscale="log", xlabel="bytes a position (measured)")
    axes.set_ylabel(r"squared error of the entries, $E\,\Vert w - p\Vert^2$")
    axes.set_title(f"Bytes against error, {numbers['positions']:,} positions (ring: as stored)")
    axes.margins(x=0.1)
    if any(point["squared_error"]["high"] <= floor for point in numbers["points"]):
        axes.set_ylim(bottom=floor)
    _plain_ticks(axes)
    finish(axes)
    axes.legend(frameon=False)
    if numbers["left_out"]:
        names = ", ".join(one["kind"] for one in numbers["left_out"])
        figure.supxlabel(f"left out, as this cache does not hold what they need: {names}", fontsize=9)


def _name_points(
    axes: Any, points: list[dict[str, Any]], x: list[float], y: list[float], stored: dict[str, Any], colour: str
) -> None:
    """Write at each point what varies, where there is room, and put a ring around the stored one."""
    seen: set[tuple[str, str]] = set()
    above = points[0]["kind"] != TopP.kind
    for point, at, value in zip(points, x, y, strict=True):
        place = f"{at:.3g}", f"{value:.2g}"
        if place not in seen:  # selections that keep the same share a place
            axes.annotate(point["name"].rpartition("=")[2], (at, value), xytext=(4, 4) if above else (-4, -11),
                          textcoords="offset points", fontsize=8.5, color=colour,
                          ha="left" if above else "right", annotation_clip=True)  # fmt: skip
        seen.add(place)
        if point["selection"] == stored:
            axes.plot([at], [value], marker="o", markersize=10, markerfacecolor="none", color=colour,
                      markeredgewidth=1.6, clip_on=False)  # fmt: skip


_SHOWN = 1e-6
"""The least error that is shown, as a part of the largest; lesser ones lie on the axis."""

_LEGEND = {
    "exact": "{} (exact)",
    "bounds": "{} (at most; the band is what it may be)",
    "estimate": "{} (estimated)",
}


def _plain_ticks(axes: Any) -> None:
    """Bytes as plain numbers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
