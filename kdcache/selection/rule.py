"""Rule: a selection and its settings, checked when built, and as fields of a manifest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import ConfigError
from kdcache.targets import SAMPLED_KINDS

KINDS = ("topk", "topp", "sample", "ipps", "full")

_FIELDS = {
    "topk": ("k",),
    "topp": ("k", "top_p"),
    "sample": ("draws",),
    "ipps": ("k",),
    "full": (),
}
"""What a manifest always says of a kind; settings that differ from their default follow."""

_OPTIONAL = {
    "topk": ("force_label",),
    "topp": ("min_k", "force_label"),
    "sample": ("force_label", "sample_temperature", "proposal_power"),
    "ipps": ("min_k", "tau", "force_label", "sample_temperature"),
    "full": (),
}


@dataclass(frozen=True)
class Selection:
    """The rule that picks entries; docs/selection.md says what each kind is good for.

    Attributes:
        kind: `topk`, the k largest; `topp`, the smallest set with mass `top_p`; `sample`, draws with
            replacement; `ipps`, unbiased with the least variance for exactly k entries; `full`, every
            token of the vocabulary (the reference).
        k: entries kept by `topk` and `ipps` (the mean, where `tau` is set), the most kept by `topp`.
        min_k: the fewest entries of `topp`, and of `ipps` with `tau`.
        top_p: the mass that `topp` keeps, in (0, 1].
        draws: of `sample`.
        tau: the threshold shared by the whole cache, for `ipps` with `--adaptive`; in (0, 1].
        force_label: the true next token is always among the entries.
        sample_temperature: T of the p_T that `sample` and `ipps` estimate.
        proposal_power: t of the distribution in proportion to p_T^t that `sample` draws from, 0.5 to 2; where it is not
            1, importance weights make up for it.

    Raises:
        ConfigError: an unknown kind, a setting out of range, or one that the kind does not have.
    """

    kind: str = "topk"
    k: int = 64
    min_k: int = 1
    top_p: float | None = None
    draws: int | None = None
    tau: float | None = None
    force_label: bool = False
    sample_temperature: float = 1.0
    proposal_power: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--select {self.kind} is not one of {', '.join(KINDS)}")
        _require_count("--k", self.k, "a target")
        _require_count("--min-k", self.min_k, "a target")
        self._check_size()
        self._check_sampling()
        if not isinstance(self.force_label, bool):
            raise ConfigError(f"--force-label is {self.force_label!r}, but it is either given or not")
        if self.kind == "ipps" and self.force_label and self.k < 2:
            raise ConfigError("--force-label with --select ipps needs --k of at least 2: one for the label, one drawn")

    def _check_size(self) -> None:
        if self.kind in ("sample", "full") and self.k != _DEFAULTS["k"]:
            what = "has --draws instead" if self.kind == "sample" else "keeps every token"
            raise ConfigError(f"--k is {self.k}, but --select {self.kind} {what}")
        if self.kind in ("topp", "ipps"):
            if self.min_k > self.k:
                raise ConfigError(f"--min-k is {self.min_k}, above --k {self.k}")
        elif self.min_k != 1:
            raise ConfigError(f"--min-k is {self.min_k}, but --select {self.kind} has a fixed number of entries")
        if self.kind == "topp":
            if self.top_p is None or not 0 < self.top_p <= 1:
                raise ConfigError(
                    f"--top-p is {_said(self.top_p)}, but --select topp needs a mass above 0 and at most 1"
                )
        elif self.top_p is not None:
            raise ConfigError(f"--top-p is {self.top_p}, but only --select topp has it, not {self.kind}")

    def _check_sampling(self) -> None:
        if self.kind == "sample":
            _require_count("--draws", self.draws, "--select sample")
        elif self.draws is not None:
            raise ConfigError(f"--draws is {self.draws}, but only --select sample has it, not {self.kind}")
        if self.tau is not None:
            if self.kind != "ipps":
                raise ConfigError(f"tau is {self.tau:g}, but only --select ipps has it, not {self.kind}")
            if not 0 < self.tau <= 1:
                raise ConfigError(f"tau is {self.tau:g}, outside 0 to 1")
        if not 0.01 <= self.sample_temperature <= 100:
            raise ConfigError(f"--sample-temperature is {self.sample_temperature:g}, outside 0.01 to 100")
        if self.sample_temperature != 1 and self.kind not in SAMPLED_KINDS:
            raise ConfigError(
                f"--sample-temperature is {self.sample_temperature:g}, but --select {self.kind} does not sample"
            )
        if not 0.5 <= self.proposal_power <= 2:
            raise ConfigError(f"--proposal-power is {self.proposal_power:g}, outside 0.5 to 2")
        if self.proposal_power != 1 and self.kind != "sample":
            raise ConfigError(
                f"--proposal-power is {self.proposal_power:g}, but only --select sample has it, not {self.kind}"
            )

    @property
    def drawn_temperature(self) -> float:
        """T of the p_T that is drawn from; the weights make up for the difference to `sample_temperature`."""
        return self.sample_temperature / self.proposal_power

    @property
    def ragged(self) -> bool:
        """Whether positions may differ in their number of entries.

        `ipps` without `tau` gives each position min(k, support) entries: k, but where float64 leaves fewer
        than k probabilities above zero.
        """
        return self.kind in ("topp", "sample", "ipps")

    def width(self, vocab_size: int) -> int:
        """K, the width of the targets over a vocabulary: the most entries that a position may have.

        Raises:
            ConfigError: k exceeds the vocabulary.
        """
        if self.kind == "full":
            return vocab_size
        if self.kind == "sample":
            assert self.draws is not None  # checked when built
            return min(vocab_size, self.draws + self.force_label)
        if self.k > vocab_size:
            raise ConfigError(f"--k is {self.k}, above the vocabulary of {vocab_size} tokens")
        if self.tau is None:
            return self.k
        # sum min(1, p / tau) is at most 1 / tau; it is rounded to the nearest count.
        return min(vocab_size, max(self.min_k, 1 + self.force_label, math.floor(1 / self.tau) + 1))

    def to_fields(self) -> dict[str, Any]:
        """What matters to this kind, as plain values; `Selection(**fields)` is the same rule."""
        optional = [name for name in _OPTIONAL[self.kind] if getattr(self, name) != _DEFAULTS[name]]
        return {name: getattr(self, name) for name in ("kind", *_FIELDS[self.kind], *optional)}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Selection)}


def _said(value: object) -> object:
    return "not given" if value is None else value


def _require_count(option: str, value: object, who: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{option} is {_said(value)}, but {who} needs at least 1")


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse temperatures that are missing, repeated, or outside 0.01 to 100."""
    if not temperatures or len(set(temperatures)) != len(temperatures):
        raise ConfigError(f"temperatures must be named once each, got {list(temperatures)}")
    for t in temperatures:
        if not 0.01 <= t <= 100:
            raise ConfigError(f"temperature {t:g} is outside 0.01 to 100")
