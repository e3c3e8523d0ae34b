"""Known: what the targets of a cache know of the teacher's distribution, and what they do not.

Selection over whole logits knows everything below. An engine that gives ready entries, such as the k largest
log-probabilities of a server, knows less. What is unknown is stored nowhere: the fields of SparseTargets are None, and
whoever needs one is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import ConfigError

TAIL_SUMS = ("complement", "remainder")
"""How the mass of a tail was found: summed over the complement itself, exact to its last digits; or as one minus the
kept mass in float64, which is as inexact as the log-probabilities that it is made of."""

_WORDS = {"entropy": "the teacher's entropy", "label_logprob": "the teacher's log-probability of the labels"}


def describe_unknown(field: str, what: str, whose: str) -> str:
    """The sentence that refuses `what`, which needs a field of SparseTargets that `whose` targets do not know."""
    return f"{whose} does not know {_WORDS[field]}, which {what} needs"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What targets know.

    Attributes:
        entropy: whether the entropy of the whole distribution at T = 1.
        label_logprob: whether log p of the true next token.
        partitions: T of each log-partition.
        tails: T of each tail; none for sampled kinds, whose weights estimate the whole distribution.
        tail_sum: `complement` or `remainder`, see `TAIL_SUMS`; None without tails.

    Raises:
        ConfigError: another `tail_sum`, or one that does not go with `tails`.
    """

    entropy: bool = True
    label_logprob: bool = True
    partitions: tuple[float, ...] = (1.0,)
    tails: tuple[float, ...] = ()
    tail_sum: str | None = None

    def __post_init__(self) -> None:
        if self.tail_sum not in (TAIL_SUMS if self.tails else (None,)):
            raise ConfigError(f"tail_sum is {self.tail_sum!r}, which does not go with {len(self.tails)} tail(s)")

    def require(self, field: str, what: str, whose: str = "this cache") -> None:
        """Refuse what needs something unknown.

        Args:
            field: `entropy` or `label_logprob`.
            what: what needs it, as the subject of a sentence.
            whose: whose targets these are.

        Raises:
            ConfigError: it is not known.
        """
        if not getattr(self, field):
            raise ConfigError(describe_unknown(field, what, whose))

    def to_fields(self) -> dict[str, Any]:
        """The JSON object of a manifest."""
        return {**dataclasses.asdict(self), "partitions": list(self.partitions), "tails": list(self.tails)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Known:
        """From a manifest's fields; nothing in them is trusted.

        Raises:
            ConfigError: a field is missing, unknown or of another type.
        """
        if set(fields) != {field.name for field in dataclasses.fields(cls)}:
            raise ConfigError(f"known has the fields {', '.join(sorted(map(str, fields)))[:80]}")
        lists = fields["partitions"], fields["tails"]
        numbers = all(isinstance(each, list) and all(type(t) is float for t in each) for each in lists)
        if not numbers or any(type(fields[name]) is not bool for name in _WORDS):
            raise ConfigError("a field of known has another type than it must have")
        return cls(**{**fields, "partitions": tuple(lists[0]), "tails": tuple(lists[1])})
