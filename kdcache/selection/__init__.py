"""Selection: which entries a position keeps, and the exact scalars over everything else.

    kind.py           Selection: what a kind is, its settings, and the registry
    topk.py, topp.py, full.py, sample.py, ipps.py   one kind each
    truncated.py      what topk, topp and full have in common
    threshold.py      tau of ipps: of a position, or of a whole cache
    select_logits.py  select: a rule over tiles of logits
    scan.py           one pass over a tile: head, complement at each temperature, entropy
    scan_dispatch.py  which of the following makes that pass:
    scan_cpu.py         compiled for a CPU
    scan_triton.py      for a GPU with Triton
    scan_torch.py       in torch's operations, for any device
    inverse_cdf.py    points of [0, 1) to ids, without a cumulative sum over the vocabulary
    uniforms.py       the random numbers: a function of (seed, shard, row, position)
    entries.py        entries of several sources joined, and which are kept
    narrow.py         fewer entries from entries
    target_faults.py  targets of somebody else, against the selection that they claim to follow

docs/selection.md says what each kind keeps, its bias and its variance, and how a new kind is written.
"""

from __future__ import annotations

from kdcache.selection import full, ipps, sample, topk, topp  # noqa: F401 - each registers its kind
from kdcache.selection.entries import Entries
from kdcache.selection.kind import Selection, Uniforms, check_temperatures, kind_names, register_kind, setting
from kdcache.selection.narrow import narrow, require_narrower
from kdcache.selection.scan import Scan
from kdcache.selection.select_logits import draws, require_finite, select, select_ahead, select_device
from kdcache.selection.threshold import solve_adaptive_tau
from kdcache.selection.truncated import TruncatedSelection

__all__ = [
    "Entries", "Scan", "Selection", "TruncatedSelection", "Uniforms", "check_temperatures", "draws", "kind_names",
    "narrow", "register_kind", "require_finite", "require_narrower", "select", "select_ahead", "select_device",
    "setting", "solve_adaptive_tau",
]  # fmt: skip
