"""Figures that need the teacher's whole distribution: the cache's own teacher, run live on the same rows as a student.

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


class TeacherCalibration:
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

    def add(self, teacher: Tensor, student: LogitSource, rows: slice) -> None:
        """Count a tile of positions.

        Args:
            teacher: `[n, V]` its logits.
            student: where the logits of all positions come from.
            rows: which of them these n are.
        """
        own = torch.empty(len(teacher), student.vocab, dtype=student.dtype, device=student.device)
        p, q = teacher.float().log_softmax(-1), student.logits(rows, own).log_softmax(-1)  # [n, V]
        same = (q.gather(-1, p.argmax(-1, keepdim=True))[:, 0] >= q.amax(-1)).float()
        columns = (torch.minimum(p, q).exp().sum(-1), (p.exp() * (p - q)).sum(-1), same)
        self._sums += torch.stack(columns).cpu().double().sum(-1)
        self._positions += len(teacher)

    def means(self) -> dict[str, float]:
        """The figures, by name."""
        names = ("acceptance", "dense_kl", "dense_top1_agreement")
        return dict(zip(names, (self._sums / max(1, self._positions)).tolist(), strict=True))
