"""Entry form: what a codec must know of the entries that a selection makes, before it reads any.

A selection gives it, a codec takes it, and neither imports the other.

Entries of truncated targets have the teacher's own log-probability, and all that is not kept is a tail. Entries of
sampled targets are heavy or light: a heavy one has a log-probability of its own, a light one (NaN) does not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EntryForm:
    """The entries of each position.

    Attributes:
        sampled: whether weights are an unbiased estimate of p_T at one temperature; then there is no tail.
        ragged: whether positions may differ in their number of entries.
        every_id: whether each position has every id of the vocabulary; then no id and no tail needs storing.
        most_heavies: of sampled targets, the most heavy entries of a position; None where all may be. Where it is 1,
            the heavy entry weighs what the lights leave.
        draws: of sampled targets, N where a light weighs how often it was drawn in N draws; None where all lights of a
            position weigh the same.
        free_weights: of sampled targets, whether each entry has a weight of its own and those of a position need not
            sum to 1. All are stored, and `most_heavies` and `draws` say nothing.
    """

    sampled: bool = False
    ragged: bool = False
    every_id: bool = False
    most_heavies: int | None = 0
    draws: int | None = None
    free_weights: bool = False
