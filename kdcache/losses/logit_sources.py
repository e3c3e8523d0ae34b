"""Where logits come from: an output head over hidden states, or stored logits. The rest of a loss is the same.

A source makes the logits of one tile of positions, takes the gradient of that tile back before it makes the next, and
gives the gradients of its own tensors in the end.

Guarantee: logits and sums of gradients are float32 (float64 for float64 inputs) whatever the parameters are, also
under autocast. On a CPU the products are float32, too. On a GPU their operands are of the dtype that autocast asks
for, or else of the parameters': half-precision products are then rounded once, before any sum is taken over
positions or over the vocabulary.
Cost: of `LinearHead`, one matrix product for the logits of a tile and one for each gradient; in memory the sum of
the weight's gradient, in float32.

Shapes: N positions, n positions of a tile, D hidden, V vocabulary, V' >= V rows of the head (padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kdcache.errors import ConfigError

Grads = tuple[Tensor | None, ...]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 if it is that, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class LogitSource(ABC):
    """Logits by tiles.

    Attributes:
        tensors: what gradients are taken in; `gradients` follows their order.
        positions: N.
        vocab: V.
        dtype: of the logits, float32 or float64.
        device: of the logits.
    """

    tensors: tuple[Tensor | None, ...]
    positions: int
    vocab: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """Put the logits of some positions into `out`, `[n, V]` of `dtype`, which the caller owns; gives it back."""

    def all_logits(self) -> Tensor:
        """`[N, V]` logits of all positions, where these are few."""
        return self.logits(slice(None), torch.empty(self.positions, self.vocab, dtype=self.dtype, device=self.device))

    @abstractmethod
    def require(self, needed: tuple[bool, ...]) -> None:
        """Make room for the gradients of the tensors that need one."""

    @abstractmethod
    def pull(self, rows: Tensor | slice, d_logits: Tensor) -> None:
        """Take in the gradient `[n, V]` of the logits made last, those of the same rows; it may be overwritten."""

    @abstractmethod
    def gradients(self) -> Grads:
        """The gradients, each in the dtype of its tensor; None where none is needed."""


class StoredLogits(LogitSource):
    """Stored logits `[N, V]`.

    Raises:
        ConfigError: another shape.
    """

    def __init__(self, logits: Tensor) -> None:
        if logits.dim() != 2:
            raise ConfigError(f"logits have shape {tuple(logits.shape)}, but must be [positions, vocabulary]")
        self.tensors, (self.positions, self.vocab) = (logits,), logits.shape
        self.dtype, self.device = wide(logits[:0]).dtype, logits.device
        self._logits = logits
        self._grad: Tensor | None = None

    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """A copy of the rows."""
        return out.copy_(self._logits[rows])

    def require(self, needed: tuple[bool, ...]) -> None:
        """Zeros, for rows that no tile contains."""
        self._grad = torch.zeros_like(self._logits) if needed[0] else None

    def pull(self, rows: Tensor | slice, d_logits: Tensor) -> None:
        """Put the rows where they belong."""
        if self._grad is not None:
            self._grad[rows] = d_logits.to(self._grad.dtype)

    def gradients(self) -> Grads:
        """That of the logits."""
        return (self._grad,)


class LinearHead(LogitSource):
    """`softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        hidden: `[N, D]`.
        weight: `[V', D]`.
        bias: `[V']` or None.
        vocab: V, the rows of the head that count; the rest are padding.
        scale: a constant factor of the logits.
        softcap: logits are bounded by it as `softcap * tanh(logits / softcap)`.
        operand: dtype of the factors of matrix products; see the module for the default.

    Raises:
        ConfigError: shapes that do not fit.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        vocab: int | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        operand: torch.dtype | None = None,
    ) -> None:
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ConfigError(
                f"hidden states of shape {tuple(hidden.shape)} and a head of {tuple(weight.shape)} do not fit: they "
                "must be [positions, D] and [vocabulary, D]"
            )
        if vocab is not None and not 1 <= vocab <= len(weight):
            raise ConfigError(f"vocab_size is {vocab}, but the head has {len(weight)} rows")
        self.tensors, self.positions = (hidden, weight, bias), len(hidden)
        self.vocab = weight.shape[0] if vocab is None else vocab
        self.dtype = torch.promote_types(wide(hidden[:0]).dtype, wide(weight[:0]).dtype)
        self.device = weight.device
        self.operand = operand or _operand_dtype(hidden, weight, self.dtype)
        self._scale, self._softcap = scale, softcap
        self._hidden, self._bias = hidden, None if bias is None else bias[: self.vocab].to(self.dtype)
        self._weight = weight[: self.vocab].to(self.operand)
        self._grads: list[Tensor | None] = [None, None, None]
        self._learns = False
        self._slope: Tensor | None = None  # of the soft cap at the logits made last

    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """One matrix product, then scale, bias and soft cap."""
        hidden = self._hidden[rows].to(self.operand)
        if self._scale != 1:
            hidden = hidden * self._scale
        if self.operand == self.dtype:
            torch.mm(hidden, self._weight.T, out=out)
        else:
            out.copy_(hidden @ self._weight.T)
        if self._bias is not None:
            out.add_(self._bias, alpha=self._scale)
        if self._softcap is not None:
            out.div_(self._softcap).tanh_()
            if self._learns:
                if self._slope is None or len(self._slope) < len(out):
                    self._slope = torch.empty_like(out)
                torch.mul(out, out, out=self._slope[: len(out)]).neg_().add_(1)
            out.mul_(self._softcap)
        return out

    def require(self, needed: tuple[bool, ...]) -> None:
        """Zeros: padded rows of the head and positions that do not count keep them."""
        hidden, weight, bias = self.tensors
        assert hidden is not None and weight is not None
        self._learns = True
        self._grads[0] = torch.zeros_like(hidden) if needed[0] else None
        self._grads[1] = torch.zeros_like(weight, dtype=self.dtype) if needed[1] else None
        self._grads[2] = torch.zeros_like(bias, dtype=self.dtype) if bias is not None and needed[2] else None

    def pull(self, rows: Tensor | slice, d_logits: Tensor) -> None:
        """Back through soft cap, scale and product."""
        if self._slope is not None:
            d_logits.mul_(self._slope[: len(d_logits)])
        d_hidden, d_weight, d_bias = self._grads
        if d_bias is not None:
            d_bias[: self.vocab].add_(d_logits.sum(0), alpha=self._scale)
        narrow = d_logits.to(self.operand)
        if d_hidden is not None:
            d_hidden[rows] = (narrow @ self._weight).mul_(self._scale).to(d_hidden.dtype)
        if d_weight is not None:
            hidden = self._hidden[rows].to(self.operand)
            d_kept = d_weight[: self.vocab]
            if self.operand == self.dtype:
                d_kept.addmm_(narrow.T, hidden, alpha=self._scale)
            else:  # no product of halves adds to a float32; by blocks, so that none is as large as the weight
                for i in range(0, self.vocab, _BLOCK):
                    d_kept[i : i + _BLOCK].add_(narrow[:, i : i + _BLOCK].T @ hidden, alpha=self._scale)

    def gradients(self) -> Grads:
        """Those of hidden states, weight and bias."""
        return tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(self._grads, self.tensors, strict=True)
        )


_BLOCK = 1 << 14


def _operand_dtype(hidden: Tensor, weight: Tensor, wide_dtype: torch.dtype) -> torch.dtype:
    """Of the factors of the head's matrix products."""
    kind = weight.device.type
    if kind == "cpu":  # where halves are no faster everywhere, and accuracy is cheap
        return wide_dtype
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)
