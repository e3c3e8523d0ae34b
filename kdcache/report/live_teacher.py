"""What only the cache's own teacher, run live beside a student, can tell: figures that need the whole distribution.

    acceptance            sum_v min(p_v, q_v): the share of a student's drafts that the teacher accepts in speculative
                          decoding (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6)
    dense_kl              KL(teacher ‖ student), nats
    dense_top1_agreement  share of positions where both prefer the same token
    teacher_ece           expected calibration error of the teacher, on the same labels

All are means over the labelled positions, at T = 1, over the cache's vocabulary.

Shapes: M labelled positions of a batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.losses import LogitSource, measure_labels
from kdcache.student.metrics import Calibration, confidence
from kdcache.teacher.opened_teacher import PositionLogits

_TILE_ELEMENTS, _LEAST_POSITIONS = 1 << 22, 32
"""Size of a tile, of which several tensors are alive at once; see `losses.fused_linear` for the second."""


class TeacherLogits(LogitSource):
    """Logits of a live teacher as a source of tiles, which takes no gradient."""

    def __init__(self, given: PositionLogits, vocab: int, device: torch.device) -> None:
        self.tensors, self.positions, self.vocab = (), len(given), vocab
        self.dtype, self.device = torch.float32, device
        self._given = given

    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """A copy of the rows, which must be a slice."""
        assert isinstance(rows, slice)
        return out.copy_(self._given.logits(rows))

    def require(self, needed: tuple[bool, ...]) -> None:
        """Nothing is needed."""

    def pull(self, rows: Tensor | slice, d_logits: Tensor) -> None:
        """Nothing is taken."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """None."""
        return ()


class TeacherFigures:
    """Calibration of a live teacher over any number of batches."""

    def __init__(self) -> None:
        self.calibration = Calibration()

    def add(self, source: LogitSource, labels: Tensor) -> None:
        """Take in its logits at M positions and their labels `[M]`."""
        self.calibration.add(**measure_labels(source, labels, confidence))


class DenseFigures:
    """Figures of one student against a live teacher, over any number of batches."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # acceptance, KL, agreement
        self._positions = 0

    def add(self, teacher: LogitSource, student: LogitSource) -> None:
        """Take in the logits of both, over the same M positions."""
        step = max(_LEAST_POSITIONS, _TILE_ELEMENTS // student.vocab)
        for start in range(0, student.positions, step):
            rows = slice(start, min(start + step, student.positions))
            p, q = (_log_softmax(source, rows) for source in (teacher, student))  # [n, V]
            same = (q.gather(-1, p.argmax(-1, keepdim=True))[:, 0] >= q.amax(-1)).float()
            columns = (torch.minimum(p, q).exp().sum(-1), (p.exp() * (p - q)).sum(-1), same)
            self._sums += torch.stack(columns).cpu().double().sum(-1)
        self._positions += student.positions

    def means(self) -> dict[str, float]:
        """The figures, by name."""
        names = ("acceptance", "dense_kl", "dense_top1_agreement")
        return dict(zip(names, (self._sums / max(1, self._positions)).tolist(), strict=True))


def _log_softmax(source: LogitSource, rows: slice) -> Tensor:
    out = torch.empty(rows.stop - rows.start, source.vocab, dtype=source.dtype, device=source.device)
    return source.logits(rows, out).log_softmax(-1)
