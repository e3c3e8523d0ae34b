"""SparseTargets: the one value that passes from the teacher's side to the student's.

Selection makes it, the codec packs and unpacks it, the losses consume it. It is a frozen
dataclass of torch tensors that share their leading axes; indexing, moving and flattening
act on all of them at once and copy nothing that torch would not copy.

Targets are truncated or sampled. Truncated ones keep some of the teacher's own probabilities, and the rest is a tail of
known mass. The weights of sampled ones are an unbiased estimate of p_T at one temperature, and they have no tail.

Shapes: `...` leading axes (positions, or rows and positions), K entries, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import TargetError
from kdcache.known import describe_unknown
from kdcache.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-5
"""By how much a log-probability that somebody else computed may exceed 0, and each adds to a mass above 1."""


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """A small target for each position: the teacher's distribution over the next token.

    Attributes:
        ids: `[..., K]` token ids; 0 past `count`.
        logprobs: `[..., K]` log p at T = 1 over the whole vocabulary, nats; NaN for sampled entries that
            store no value; -inf past `count`.
        weights: `[..., K]` target weights: p itself if truncated; if sampled, unbiased estimates of p_T, summing to 1
            (in the mean only, where draws have importance weights); 0 past `count`.
        count: `[...]` entries in use; 0 where a position has no target (all its scalars are 0).
        log_partition: `[..., n_T]` log sum_j p_j^(1/T), one column for each of `temperatures`.
        log_tail: `[..., n_T]` log of the mass at T of everything not kept, -inf if all is kept; None if sampled.
        entropy: `[...]` entropy of p, nats; None if unknown.
        label_logprob: `[...]` log p of the true next token; None if unknown, NaN at a position that has none.
        temperatures: the T of each column, in the order named when the target was made.
        kind: the selection that made it.
        sample_temperature: the T of the p_T that sampled weights estimate.
    """

    ids: Tensor
    logprobs: Tensor
    weights: Tensor
    count: Tensor
    log_partition: Tensor
    log_tail: Tensor | None = None
    entropy: Tensor | None = None
    label_logprob: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)
    kind: str = "topk"
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        lead = self.count.shape
        entries, per_temperature = (*lead, self.ids.shape[-1]), (*lead, len(self.temperatures))
        expected = {
            "ids": entries, "logprobs": entries, "weights": entries, "entropy": tuple(lead),
            "label_logprob": tuple(lead), "log_partition": per_temperature, "log_tail": per_temperature,
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise TargetError(
                    f"SparseTargets.{name} has shape {tuple(value.shape)}, expected {shape} "
                    f"for count {tuple(lead)} and {len(self.temperatures)} temperature(s)"
                )

    @staticmethod
    def from_topk(ids: Tensor, logprobs: Tensor, *, label_logprob: Tensor | None = None) -> SparseTargets:
        """Targets of kind `topk` from entries that somebody else computed, such as the top-k of a server.

        Entries are sorted by falling probability. The tail is one minus the kept mass in float64. Its error is
        that of `logprobs`: about 1e-7 where exact ones were rounded to float32, more where they were computed in
        float32 (2e-6 was measured). It is 0 where the kept mass reaches 1. The entropy is unknown, and so is the
        label's log-probability unless it is given.

        Args:
            ids: `[..., K]` token ids, in any order.
            logprobs: `[..., K]` log p over the whole vocabulary at T = 1, nats.
            label_logprob: `[...]` log p of the true next token.

        Raises:
            TargetError: shapes or types that do not fit, a negative id, an id twice at a position, a log-probability
                that is not finite or above 0, or a kept mass above 1.
        """
        if ids.shape != logprobs.shape or not ids.ndim or not ids.shape[-1] or ids.is_floating_point():
            raise TargetError(f"ids {tuple(ids.shape)} and logprobs {tuple(logprobs.shape)} are not entries [..., K]")
        given = logprobs.double()
        if not ((given > -torch.inf) & (given <= _ROUNDING)).all():  # false for NaN
            raise TargetError("a log-probability of an entry is not finite, or is above 0")
        mass = given.exp().sum(-1)  # [...]
        if (mass > 1 + _ROUNDING * ids.shape[-1]).any():
            raise TargetError(f"the entries of a position have a mass of {float(mass.max()):.6f}, above 1")
        ordered = ids.sort(-1).values
        if (ordered[..., :1] < 0).any() or (ordered[..., 1:] == ordered[..., :-1]).any():
            raise TargetError("a position names an id twice, or a negative one")
        if label_logprob is not None and (label_logprob.shape != mass.shape or not (label_logprob <= _ROUNDING).all()):
            raise TargetError(f"label_logprob is not one log-probability, at most 0, for each of {tuple(mass.shape)}")
        falling = given.argsort(dim=-1, descending=True, stable=True)
        kept = given.gather(-1, falling).clamp(max=0).float()
        return SparseTargets(
            ids=ids.gather(-1, falling),
            logprobs=kept,
            weights=kept.exp(),
            count=torch.full_like(mass, ids.shape[-1], dtype=torch.int64),
            log_partition=torch.zeros_like(mass, dtype=torch.float32)[..., None],
            log_tail=torch.log1p(-mass.clamp(max=1))[..., None].float(),
            label_logprob=None if label_logprob is None else label_logprob.float().clamp(max=0),
        )

    @property
    def sampled(self) -> bool:
        """Whether weights are unbiased estimates; else the targets are truncated, and have a tail."""
        return self.log_tail is None

    def require(self, field: str, what: str) -> Tensor:
        """`entropy` or `label_logprob`, for something that needs it.

        Args:
            field: its name.
            what: what needs it, as the subject of a sentence.

        Raises:
            TargetError: it is unknown.
        """
        value: Tensor | None = getattr(self, field)
        if value is None:
            raise TargetError(describe_unknown(field, what, "this cache"))
        return value

    @property
    def valid(self) -> Tensor:
        """`[..., K]` bool: which entries are in use."""
        return torch.arange(self.ids.shape[-1], device=self.count.device) < self.count[..., None]

    @property
    def has_target(self) -> Tensor:
        """`[...]` bool: which positions have a target."""
        return self.count > 0

    def _tensors(self) -> list[str]:
        """Names of the fields that are known tensors."""
        return [field.name for field in dataclasses.fields(self) if isinstance(getattr(self, field.name), torch.Tensor)]

    def _map(self, f: Callable[[Tensor], Tensor]) -> SparseTargets:
        tensors: dict[str, Any] = {name: f(getattr(self, name)) for name in self._tensors()}
        return dataclasses.replace(self, **tensors)

    def __getitem__(self, index: object) -> SparseTargets:
        """Index the leading axes: an int, a slice, an index tensor or a boolean mask."""
        return self._map(lambda tensor: tensor[index])  # type: ignore[index]

    def split(self, counts: list[int]) -> list[SparseTargets]:
        """Consecutive parts along the first axis, of so many positions each."""
        ends = itertools.accumulate(counts, initial=0)
        return [self[start:end] for start, end in itertools.pairwise(ends)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """The same targets in page-locked memory, for an asynchronous copy to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def cat(parts: list[SparseTargets]) -> SparseTargets:
        """Join along the first axis; all parts must agree on K, kind, temperatures and on what is unknown."""
        first = parts[0]

        def sort(part: SparseTargets) -> tuple[object, ...]:
            return part.kind, part.temperatures, part.sample_temperature, part.ids.shape[-1], part._tensors()

        if any(sort(part) != sort(first) for part in parts):
            raise TargetError("targets of different kinds, temperatures or widths cannot be joined")
        names = first._tensors()
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
        return dataclasses.replace(first, **joined)

    def spread(self, slots: Tensor | slice, length: int) -> SparseTargets:
        """Lay targets of n positions out over `length` slots; a slot without one has count 0 and zeros.

        Args:
            slots: `[n]` the slot of each position, or the slice of them.
            length: slots in all.
        """

        def place(tensor: Tensor, fill: float = 0) -> Tensor:
            out = tensor.new_full((length, *tensor.shape[1:]), fill)
            out[slots] = tensor
            return out

        return dataclasses.replace(self._map(place), logprobs=place(self.logprobs, -torch.inf))

    def widen(self, width: int) -> SparseTargets:
        """The same targets with room for `width` entries a position, so that `cat` joins them with wider ones.

        Raises:
            TargetError: they are wider already.
        """
        more = width - self.ids.shape[-1]
        if more < 0:
            raise TargetError(f"targets of {self.ids.shape[-1]} entries a position have no room in {width}")
        return dataclasses.replace(
            self,
            ids=torch.nn.functional.pad(self.ids, (0, more)),
            logprobs=torch.nn.functional.pad(self.logprobs, (0, more), value=-torch.inf),
            weights=torch.nn.functional.pad(self.weights, (0, more)),
        )

    def at_temperature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Exact log-probabilities of the entries and of the tail at a temperature.

        Returns:
            `[..., K]` log p_T of each entry (-inf past `count`) and `[...]` log of the tail at T.

        Raises:
            TargetError: T was not stored, and some position has a tail that only a stored
                partition could soften; or the targets are sampled, whose weights say nothing of one entry.
        """
        if self.log_tail is None:
            raise TargetError(f"{self.kind} targets have weights, but no log-probability of each entry")
        if not temperature > 0:
            raise TargetError(f"temperature {temperature:g} is not positive")
        if temperature in self.temperatures:
            column = self.temperatures.index(temperature)
            logprobs = self.logprobs / temperature - self.log_partition[..., column, None]
            return logprobs, self.log_tail[..., column]
        if torch.isneginf(self.log_tail[..., 0][self.count > 0]).all():  # everything is kept
            scaled = self.logprobs / temperature
            partition = torch.where(self.count > 0, scaled.logsumexp(-1), 0.0)
            return scaled - partition[..., None], torch.full_like(partition, -torch.inf)
        raise self._not_exact(temperature)

    def label_at_temperature(self, temperature: float, what: str) -> Tensor:
        """`[...]` exact log p_T of the true next token.

        Args:
            temperature: T.
            what: what needs it, as the subject of a sentence.

        Raises:
            TargetError: it is unknown, or the partition at T was not stored and cannot be summed.
        """
        label = self.require("label_logprob", what)
        if temperature in self.temperatures:
            return label / temperature - self.log_partition[..., self.temperatures.index(temperature)]
        if self.log_tail is not None and torch.isneginf(self.log_tail[..., 0][self.count > 0]).all():
            scaled = self.logprobs / temperature
            return label / temperature - torch.where(self.count > 0, scaled.logsumexp(-1), 0.0)
        raise self._not_exact(temperature)

    def _not_exact(self, temperature: float) -> TargetError:
        stored = ", ".join(f"{t:g}" for t in self.temperatures)
        return TargetError(
            f"temperature {temperature:g} is not exact for these targets: they hold the "
            f"partitions of temperature(s) {stored} only"
        )
