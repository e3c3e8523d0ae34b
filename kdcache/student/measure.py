"""Measure: a student's figures over rows of a cache, all at T = 1.

`nll` is a mean over all labelled positions; the others compare with the teacher, so they are means over the positions
that carry a target, `targets` of them, and None where there is none.

    nll             of the true next token under the student, nats
    teacher_nll     the same under the teacher, from the cache
    delta_nll       the student's less the teacher's
    kl              KL(teacher ‖ student); its kind is in `kl_kind`: `dense` when the cache keeps
                    everything, `lower-bound` when the tail is one bucket (not comparable across k),
                    `estimate` when the targets are sampled: unbiased, with `kl_standard_error` from its spread
                    over positions; None if they were sampled at another temperature
    top1_agreement  share of positions where both prefer the same token
    teachers        of a pool: kl and teacher_nll of each; the figures above are told of the first

Sums are kept in float64, so the order of batches does not show. Those of several caches add up to the figures over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.isolation import packed_forward
from kdcache.losses import measure_positions, of_teacher
from kdcache.store.manifest import Manifest
from kdcache.student.data import Rows, batches, labelled
from kdcache.student.teachers import PooledCache, RowReader, Teacher
from kdcache.targets import SAMPLED_KINDS


@dataclass
class Tally:
    """Sums over positions.

    Attributes:
        kinds: what the kl of these positions is.
        rows, positions: how many were measured.
        sums: of each figure, and `has_target`.
        teachers: of a pool, in order; empty if there is nothing pooled.
    """

    kinds: set[str] = field(default_factory=set)
    rows: int = 0
    positions: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    teachers: tuple[Teacher, ...] = ()

    def add(self, name: str, value: float) -> None:
        """Add to a sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def join(self, other: Tally) -> None:
        """Add what another counted."""
        self.kinds |= other.kinds
        self.teachers = other.teachers
        self.rows += other.rows
        self.positions += other.positions
        for name, value in other.sums.items():
            self.add(name, value)

    def figures(self) -> dict[str, Any]:
        """The figures, as the module describes them.

        Raises:
            ConfigError: no row carried a label.
        """
        if not self.positions:
            raise ConfigError(
                f"the {self.rows} row(s) to measure on carry no label; hold out more, or measure other rows"
            )
        teacher_nll = self._mean("teacher_nll")
        found: dict[str, Any] = {
            "nll": self.sums["nll"] / self.positions,
            "teacher_nll": teacher_nll,
            "delta_nll": None if teacher_nll is None else self._mean("nll_at_targets", less=teacher_nll),
            "kl": self._mean("kl"),
            "kl_kind": next(iter(self.kinds)) if len(self.kinds) == 1 else "lower-bound",
            "top1_agreement": self._mean("top1_agreement"),
            "positions": self.positions,
            "targets": self._targets(0),
        }
        if found["kl_kind"] == "estimate" and found["kl"] is not None:
            found["kl_standard_error"] = self._kl_error(0)
        if self.teachers:
            found["teachers"] = [self._of_teacher(number) for number in range(len(self.teachers))]
        return found

    def _of_teacher(self, number: int) -> dict[str, Any]:
        teacher = self.teachers[number]
        found = {
            "cache": teacher.name,
            "weight": teacher.weight / sum(each.weight for each in self.teachers),
            "kl": self._mean("kl", number),
            "kl_kind": _kl_kind(teacher.cache.manifest),
            "teacher_nll": self._mean("teacher_nll", number),
            "targets": self._targets(number),
        }
        if found["kl_kind"] == "estimate" and found["kl"] is not None:
            found["kl_standard_error"] = self._kl_error(number)
        return found

    def _targets(self, number: int) -> int:
        """Positions at which a teacher has a target."""
        return round(self.sums[of_teacher("has_target", number)])

    def _mean(self, figure: str, number: int = 0, less: float = 0.0) -> float | None:
        """Over those positions, less a number; None where there are none, or no such figure."""
        total, targets = self.sums.get(of_teacher(figure, number)), self._targets(number)
        return None if total is None or not targets else total / targets - less

    def _kl_error(self, number: int) -> float:
        mean, square = self._mean("kl", number) or 0.0, self._mean("kl_square", number) or 0.0
        return math.sqrt(max(0.0, square - mean**2) / self._targets(number))


def measure(
    model: Any,
    cache: Cache,
    rows: Rows,
    device: torch.device,
    batch_rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Figures of a student over rows of a cache; see the module for what they mean.

    Raises:
        ConfigError: no row carries a label.
    """
    return tally(model, cache, rows, device, batch_rows, on_progress).figures()


def measure_each(
    model: Any,
    caches: Mapping[str, RowReader],
    rows: Sequence[Rows],
    device: torch.device,
    batch_rows: int = 8,
) -> dict[str, Any]:
    """Figures over rows of several caches together; if there are several, under `caches` those of each.

    Raises:
        ConfigError: no row of some cache carries a label.
    """
    whole, each = Tally(), {}
    for (name, cache), chosen in zip(caches.items(), rows, strict=True):
        counted = tally(model, cache, chosen, device, batch_rows)
        whole.join(counted)
        each[name] = counted.figures()
    return whole.figures() if len(each) == 1 else {**whole.figures(), "caches": each}


def tally(
    model: Any,
    cache: RowReader,
    rows: Rows,
    device: torch.device,
    batch_rows: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Sums of a student's figures over rows of a cache."""
    teachers = cache.teachers if isinstance(cache, PooledCache) else ()
    counted = Tally(kinds={_kl_kind(cache.manifest)}, teachers=teachers)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches(cache, rows, batch_rows):
            mask = labelled(batch)
            logits = packed_forward(model, batch["input_ids"].to(device), batch["position_ids"].to(device)).logits
            logits = logits[mask.to(device)][:, : cache.manifest.vocab_size].float()  # [M, V]
            figures = measure_positions(logits, batch["targets"].to(device), batch["labels"][mask].to(device))
            figures["nll_at_targets"] = figures["nll"] * figures["has_target"]
            for number in range(max(1, len(teachers))):
                if (kl := figures.get(of_teacher("kl", number))) is not None:
                    figures[of_teacher("kl_square", number)] = kl.double().square()
            for name, values in figures.items():
                counted.add(name, values.double().sum().item())
            counted.positions += int(mask.sum())
            counted.rows += len(mask)
            if on_progress:
                on_progress(counted.rows, len(rows))
    model.train(training)
    return counted


def _kl_kind(manifest: Manifest) -> str:
    if manifest.selection["kind"] in SAMPLED_KINDS:
        return "estimate"
    return "dense" if manifest.width == manifest.vocab_size else "lower-bound"
