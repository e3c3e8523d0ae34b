"""Selection: which entries a position keeps, and the exact scalars over everything else.

    rule.py         Selection: the rule and its settings, checked when built
    tiles.py        select: a rule over tiles of logits
    scan.py         a tile seen once: head, complement at each temperature, entropy
    visits.py       the one visit to the logits that a device gets:
    loops.py          compiled for a CPU
    kernels.py        for a GPU with Triton
    passes.py         in torch's operations, for any
    largest.py      the k largest, ties by id
    truncated.py    topk, topp, full
    ipps.py         tau, heavies and lights
    adaptive.py     one tau for a whole cache
    sample.py       draws with replacement
    inverse_cdf.py  points of [0, 1) to ids, without a cumulative sum over the vocabulary
    uniforms.py     the random numbers: a function of (seed, shard, row, position)
    narrow.py       fewer entries from entries

docs/selection.md says what each rule keeps, its bias and its variance.
"""

from __future__ import annotations

from kdcache.selection.adaptive import solve_adaptive_tau
from kdcache.selection.narrow import narrow, require_narrower
from kdcache.selection.rule import KINDS, Selection, check_temperatures
from kdcache.selection.select_logits import draws, require_finite, select, select_ahead, select_device

__all__ = [
    "KINDS", "Selection", "check_temperatures", "draws", "narrow", "require_finite", "require_narrower", "select",
    "select_ahead", "select_device", "solve_adaptive_tau",
]  # fmt: skip
