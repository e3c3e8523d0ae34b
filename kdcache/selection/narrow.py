"""Narrow: fewer entries from entries, for `kdcache convert`, without the teacher.

Each kind does it in its own way: truncated ones keep the largest and move the rest into every stored tail, exactly;
sampled ones draw again, without bias. Fresh random numbers are needed: a number that decided which entries there are
would bias which of them stay.

Shapes: N positions.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError
from kdcache.lazy_torch import no_grad
from kdcache.selection.entries import Entries
from kdcache.selection.kind import Selection
from kdcache.selection.uniforms import NARROW, default_keys, uniforms
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor


@no_grad
def narrow(
    targets: SparseTargets,
    selection: Selection,
    *,
    source: Selection,
    labels: Tensor | None = None,
    seed: int = 0,
    keys: Tensor | None = None,
) -> SparseTargets:
    """Lower the number of entries.

    Args:
        targets: `[N]` positions; one with `count` 0 stays as it is.
        selection: the rule to obey from now on.
        source: the rule that made the targets.
        labels: `[N]` true next tokens, for rules with `force_label`.
        seed: of the sampled kinds.
        keys: `[N, 3]` int64 shard, row, position, as for `select`.

    Returns:
        The same scalars over fewer entries, in the order that `select` gives; no wider than the rule's width.

    Raises:
        ConfigError: the rule asks for entries that the source did not keep.
        TargetError: a forced label that is not among the entries, or weights that are no counts of draws.
    """
    require_narrower(selection, source, targets.ids.shape[-1])
    if selection.labelled and labels is None:
        raise ConfigError("force_label needs the true next tokens")
    entries = Entries.by_id(targets, labels if selection.labelled else None)
    keys = default_keys(len(targets.count), targets.count.device) if keys is None else keys.to(targets.count.device)
    return selection.narrow(targets, entries, source, lambda size, draws: uniforms(seed, keys, _domain_of(size), draws))


def _domain_of(size: float) -> int:
    """The domain of the numbers for a size: another for each, so that entries narrowed twice see fresh ones twice."""
    (word,) = struct.unpack("<Q", struct.pack("<d", size))
    return NARROW ^ int(word)


def require_narrower(new: Selection, old: Selection, width: int) -> None:
    """Refuse a rule that asks for entries that another one, of `width` entries, did not keep.

    Raises:
        ConfigError: naming the setting, its value and the limit.
    """
    if not new.made_from(old):
        raise ConfigError(f"kind {new.kind} cannot be made from the entries of {old.kind}; dump it anew")
    if not old.form.every_id and new.labelled != old.labelled:
        raise ConfigError("force_label cannot be changed after the dump")
    if new.target_temperature != old.target_temperature:
        raise ConfigError(
            f"sample_temperature is {new.target_temperature:g}, "
            f"but the entries were drawn at {old.target_temperature:g}"
        )
    for name, kept in new.limits(old, width).items():
        if getattr(new, name) > kept:
            raise ConfigError(
                f"{name} is {getattr(new, name):g}, but the entries were kept with {kept:g}; "
                "it can be lowered, not raised"
            )
