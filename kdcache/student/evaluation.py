"""A student's figures over rows of a cache, all at T = 1, without `[positions, vocabulary]` in memory.

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
    ece             expected calibration error of the student's most likely token (`student.metrics`)
    acceptance      of the student's drafts by the teacher (`student.metrics`): known when everything is kept, else
                    between `acceptance_low` and `acceptance_high`; all three None for sampled targets
    bits_per_byte   the nll of the student's own tokens over the bytes of text that they stand for, in bits: comparable
                    between tokenizers. Labels that stand for no text (the end of a document) do not count; None where
                    the bytes of the tokens are not known. `teacher_bits_per_byte` is the same of the teacher's tokens
    aligned_bytes   of a student with another tokenizer: share of these bytes that lie in chunks (`kdcache.alignment`);
                    with it `tokens_per_chunk`, of the student
    teachers        of a pool: kl and teacher_nll of each; the figures above compare with the first

Guarantee: all come from one forward pass, a tile of logits at a time, made inside it as the loss is in training.
Sums are kept in float64, so neither the order of batches nor their distribution over ranks changes them by more than a
rounding of float64. The sums of several caches add up to the figures over all.
Cost: in memory, one tile of logits, or all of a batch's for a model that `fuse_head` refuses; in time, a forward pass,
shared by the ranks of a run.

Shapes: M labelled positions of a batch, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdcache.aligned_targets import AlignedTargets
from kdcache.alignment import AlignedRows
from kdcache.cache import Cache
from kdcache.errors import ConfigError, KdcacheError, ModelError
from kdcache.losses import LogitSource, Pool, of_teacher
from kdcache.losses import measure as measure_targets
from kdcache.store.manifest import Manifest
from kdcache.student import distributed
from kdcache.student.data import Rows, batches, labelled
from kdcache.student.fused_head import FusedHead, fuse_head, with_logits
from kdcache.student.metrics import Calibration, acceptance_bounds, confidence
from kdcache.student.multi_teacher import PooledCache, RowReader, TeacherCache
from kdcache.targets import SparseTargets
from kdcache.token_bytes import TokenBytes


def measure(
    model: Any,
    cache: RowReader,
    rows: Rows,
    device: torch.device,
    batch_rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Figures of a student over rows of a cache; see the module for what they mean.

    Raises:
        ConfigError: no row carries a label.
    """
    return _figures(model, cache, rows, device, batch_rows, on_progress).means()


def measure_each(
    model: Any,
    caches: Mapping[str, RowReader],
    rows: Sequence[Rows],
    device: torch.device,
    batch_rows: int = 8,
) -> dict[str, Any]:
    """Figures over rows of several caches together; if there are several, under `caches` those of each.

    The ranks of a run share the batches, and each is given the figures over all of them, so every rank must call this.

    Raises:
        ConfigError: no row of some cache carries a label.
    """
    whole, each = StudentFigures(), {}
    for (name, cache), chosen in zip(caches.items(), rows, strict=True):
        mine = _figures(model, cache, chosen, device, batch_rows, ranks=distributed.world())
        counted = StudentFigures.of(cache)
        for part in distributed.gather(mine.counts()):
            counted.add_counts(part)
        whole.join(counted)
        each[name] = counted.means()
    return whole.means() if len(each) == 1 else {**whole.means(), "caches": each}


def _figures(
    model: Any,
    cache: RowReader,
    rows: Rows,
    device: torch.device,
    batch_rows: int,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: int = 1,
) -> StudentFigures:
    """Figures over the batches that fall to this rank: the first to rank 0, the second to rank 1, and so on.

    Whole batches are dealt out, so each holds the rows that it has on one rank, and its figures are the same.
    """
    figures, vocab = StudentFigures.of(cache), cache.row_spec.vocab_size
    head = head_or_none(model, device)
    shares = _shares(rows, batch_rows, ranks)
    mine = shares[distributed.rank() if ranks > 1 else 0]
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches(cache, mine, batch_rows):
            with_logits(model, head, batch, device, vocab, functools.partial(figures.add, batch=batch))
            if on_progress:
                on_progress(figures.rows, len(rows))
        if isinstance(model, FSDPModule) and _batches(mine, batch_rows) < _batches(shares[0], batch_rows):
            # Ranks gather sharded weights together, so each must run as many forward passes as the others.
            for batch in batches(cache, rows[:1], 1):
                with_logits(model, head, batch, device, vocab, lambda _: None)
    model.train(training)
    return figures


def _shares(rows: Rows, batch_rows: int, ranks: int) -> list[list[int]]:
    """The rows of each rank: whole batches, dealt out in turn."""
    numbers = [int(row) for row in rows]
    dealt = [numbers[start : start + batch_rows] for start in range(0, len(numbers), batch_rows)]
    return [list(itertools.chain.from_iterable(dealt[rank::ranks])) for rank in range(ranks)]


def _batches(rows: Sequence[int], batch_rows: int) -> int:
    return -(-len(rows) // batch_rows)


def head_or_none(model: Any, device: torch.device) -> FusedHead | None:
    """What `fuse_head` gives; None for a model that it does not know, whose own logits are then looked at whole."""
    try:
        return fuse_head(model, device)
    except ModelError:
        return None


class StudentFigures:
    """Figures of one student over any number of batches.

    Attributes:
        calibration: of its confidence.
        rows: how many were measured.
        teachers: of a pool, in order; empty if there is nothing pooled.
    """

    def __init__(self) -> None:
        self.calibration, self.rows = Calibration(), 0
        self.teachers: tuple[TeacherCache, ...] = ()
        self._bytes: TokenBytes | None = None
        self._kinds: set[str] = set()
        self._sums: dict[str, float] = {}
        self._labels = 0

    @staticmethod
    def of(cache: RowReader) -> StudentFigures:
        """Those over rows of one cache, none so far."""
        figures = StudentFigures()
        figures._kinds = {kl_kind(cache.manifest)}
        if isinstance(cache, AlignedRows):
            if figures._kinds == {"dense"} and not cache.alignment.complete:
                figures._kinds = {"lower-bound"}
        else:
            first = cache.teachers[0].cache if isinstance(cache, PooledCache) else cache
            figures._bytes = _token_bytes(first) if isinstance(first, Cache) else None
        if isinstance(cache, PooledCache):
            figures.teachers = cache.teachers
        return figures

    def join(self, other: StudentFigures) -> None:
        """Add the figures over other rows, of this cache or another."""
        self.teachers = other.teachers
        self._kinds |= other._kinds
        self.add_counts(other.counts())

    def counts(self) -> dict[str, Any]:
        """What was counted, without the caches: small enough to be sent to another rank."""
        return {"sums": self._sums, "labels": self._labels, "rows": self.rows, "calibration": self.calibration}

    def add_counts(self, counts: dict[str, Any]) -> None:
        """Add what `counts` of another gave."""
        self.calibration.join(counts["calibration"])
        self.rows += counts["rows"]
        self._labels += counts["labels"]
        for name, value in counts["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def add(self, source: LogitSource, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Take in the student's logits at the M labelled slots of a batch.

        Returns:
            `[M]` float64 each figure, on the CPU; those that compare with a target are 0 where there is none.
        """
        labels = batch["labels"][labelled(batch)].to(source.device)
        pool = Pool.of(batch["targets"].to(source.device))
        found = measure_targets(source, pool, labels, (confidence, acceptance_bounds))
        found["nll_at_targets"] = found["nll"] * found["has_target"]
        columns = (
            torch.stack([values.to(source.dtype) for values in found.values()]).cpu().double()
        )  # one copy; [figures, M]
        figures = dict(zip(found, columns, strict=True))
        self.calibration.add(figures.pop("confidence"), figures.pop("correct"))
        for number in range(len(pool.targets)):
            if (kl := figures.get(of_teacher("kl", number))) is not None:
                figures[of_teacher("kl_square", number)] = kl.square()
        for name, value in {
            **{name: values.sum().item() for name, values in figures.items()},
            **_sums_of_bytes(figures, pool.targets[0], self._label_bytes(batch)),
        }.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.rows += len(batch["labels"])
        self._labels += len(labels)
        return figures

    def _label_bytes(self, batch: dict[str, Any]) -> Tensor | None:
        """`[M]` float64 bytes of each label; None if they are not known."""
        targets = batch["targets"]
        if isinstance(targets, AlignedTargets):
            return targets.label_bytes.cpu().double()
        if self._bytes is None or "input_ids" not in batch:  # of logits and targets alone
            return None
        mask = labelled(batch).cpu()
        labels, before, places = (batch[name].cpu()[mask].numpy() for name in ("labels", "input_ids", "position_ids"))
        return torch.from_numpy(self._bytes.of_labels(labels, before, places)).double()

    def means(self) -> dict[str, Any]:
        """The figures, as the module describes them.

        Raises:
            ConfigError: there was no labelled position.
        """
        if not self._labels:
            raise ConfigError(
                f"the {self.rows} row(s) to measure on carry no label; hold out more, or measure other rows"
            )
        teacher_nll = self._mean("teacher_nll")
        kind = next(iter(self._kinds)) if len(self._kinds) == 1 else "lower-bound"
        bounded = "estimate" not in self._kinds  # by every cache; a part of the positions bounds nothing
        low, high = (self._mean(f"acceptance_{end}") if bounded else None for end in ("low", "high"))
        found: dict[str, Any] = {
            "nll": self._sums["nll"] / self._labels,
            "teacher_nll": teacher_nll,
            "delta_nll": None if teacher_nll is None else self._mean("nll_at_targets", less=teacher_nll),
            "kl": self._mean("kl"),
            "kl_kind": kind,
            "top1_agreement": self._mean("top1_agreement"),
            "ece": self.calibration.error,
            "acceptance": low if kind == "dense" else None,
            "acceptance_low": low,
            "acceptance_high": high,
            "positions": self._labels,
            "targets": self._targets(0),
        }
        found |= self._of_bytes()
        if kind == "estimate" and found["kl"] is not None:
            found["kl_standard_error"] = self._kl_error(0)
        if self.teachers:
            found["teachers"] = [self._of_teacher(number) for number in range(len(self.teachers))]
        return found

    def _of_bytes(self) -> dict[str, Any]:
        """Figures of each byte of text; of aligned rows also how much of the text is aligned."""
        sums, nat = self._sums, 1 / math.log(2)
        size, known = sums.get("bytes", 0.0), sums.get("teacher_bytes", 0.0)
        found: dict[str, Any] = {
            "bits_per_byte": nat * sums["nll_of_bytes"] / size if size else None,
            "teacher_bits_per_byte": nat * sums["teacher_nll_of_bytes"] / known if known else None,
        }
        if "chunks" in sums:
            found["aligned_bytes"] = sums["chunk_bytes"] / size if size else None
            found["tokens_per_chunk"] = sums["chunk_tokens"] / sums["chunks"] if sums["chunks"] else None
        return found

    def _of_teacher(self, number: int) -> dict[str, Any]:
        teacher = self.teachers[number]
        found = {
            "cache": teacher.name,
            "weight": teacher.weight / sum(each.weight for each in self.teachers),
            "kl": self._mean("kl", number),
            "kl_kind": kl_kind(teacher.cache.manifest),
            "teacher_nll": self._mean("teacher_nll", number),
            "targets": self._targets(number),
        }
        if found["kl_kind"] == "estimate" and found["kl"] is not None:
            found["kl_standard_error"] = self._kl_error(number)
        return found

    def _targets(self, number: int) -> int:
        """Positions at which a teacher has a target."""
        return round(self._sums[of_teacher("has_target", number)])

    def _mean(self, figure: str, number: int = 0, less: float = 0.0) -> float | None:
        """Over those positions, less a number; None where there are none, or no such figure."""
        total, targets = self._sums.get(of_teacher(figure, number)), self._targets(number)
        return None if total is None or not targets else total / targets - less

    def _kl_error(self, number: int) -> float:
        mean, square = self._mean("kl", number) or 0.0, self._mean("kl_square", number) or 0.0
        return math.sqrt(max(0.0, square - mean**2) / self._targets(number))


def _sums_of_bytes(figures: dict[str, Tensor], targets: SparseTargets, label_bytes: Tensor | None) -> dict[str, float]:
    """What the figures of each byte are made of, summed over a batch.

    Args:
        figures: `[M]` each.
        targets: of the first teacher, at the M labels.
        label_bytes: `[M]` float64; None if they are not known.
    """
    if label_bytes is None:
        return {}
    text = label_bytes > 0
    found = {"bytes": label_bytes.sum().item(), "nll_of_bytes": figures["nll"][text].sum().item()}
    if isinstance(targets, AlignedTargets):
        some = (targets.chunk_bytes > 0).cpu()
        size, log_p = targets.chunk_bytes.cpu().double()[some], targets.chunk_logprob.cpu().double()[some]
        found["chunks"], found["chunk_bytes"] = float(targets.has_target.sum()), size.sum().item()
        found["chunk_tokens"] = float(targets.chunk_length.sum())
        if not bool(log_p.isnan().any()):
            found["teacher_nll_of_bytes"], found["teacher_bytes"] = -log_p.sum().item(), size.sum().item()
    elif "teacher_nll" in figures:
        some = text & (targets.count > 0).cpu()
        found["teacher_nll_of_bytes"] = figures["teacher_nll"][some].sum().item()
        found["teacher_bytes"] = label_bytes[some].sum().item()
    return found


@functools.lru_cache(maxsize=8)
def _token_bytes(cache: Cache) -> TokenBytes | None:
    """The bytes of a cache's tokens; None where they are not known."""
    try:
        found = TokenBytes(cache.load_tokenizer())
        found.require_exact("cache")
    except KdcacheError:
        return None
    return found


def kl_kind(manifest: Manifest) -> str:
    """What the KL of a student from the targets of a cache is: `dense`, `lower-bound` or `estimate`; see the module."""
    if manifest.rule.sampled:
        return "estimate"
    return "dense" if manifest.width == manifest.vocab_size else "lower-bound"
