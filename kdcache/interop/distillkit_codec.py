"""The bytes of DistillKit: k log-probabilities of a position, and their ids, as its `LogprobCompressor` packs them.

Falling log-probabilities v_0 >= v_1 >= ... of a position become, one behind the other, the lowest byte first:

    exact        the first `exact_k`, as numbers of `exact_dtype`
    coefficients of `polynomial_terms` over t = 0, 1, ... (or t from 0 to 1 with `normalize_t`), fitted to the others
    bins         for each of `residual_bins`: a scale, and what the fit has left of `num_elements` values, in
                 `element_bits` bits each: q - 2^(bits - 1) times the scale (of one bit: -1 or 1)

With `delta_encoding` every value but the first is the difference to the one before. Ids are written with
ceil(log2 d) bits each, the highest bit first, and filled up to a whole byte.

Sources: arcee-ai/DistillKit, `distillkit/compression/config.py`; the code of the bytes as AliasJeff/alias-distill-kit
keeps it, `distillkit/compression/monotonic_logprobs.py` and `bitpack.py`. No code was taken over.

Shapes: m positions, k entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import CorpusError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_MOST_K = 1 << 16
_MOST_VOCABULARY = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Some of the residuals: `num_elements` of `element_bits` bits, times a scale of `scale_dtype`."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A compression configuration of DistillKit, under its own names.

    Attributes:
        d: vocabulary size, which decides the bits of an id.
        k: entries of a position.
        exact_k: how many of them are stored as plain numbers.
        exact_dtype, term_dtype: of these numbers, and of the coefficients.
        polynomial_terms: powers of t, or `sqrt` or `exp`.
        residual_bins: what the fit has left.
        delta_encoding: differences instead of values.
        normalize_t: t from 0 to 1.

    Raises:
        CorpusError: a field that is missing, of another type or out of range.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @classmethod
    def from_fields(cls, fields: Any, where: str) -> Compression:
        """From the mapping of a `compression_config.yaml`; its `error_diffusion` changes nothing for a reader."""
        if not isinstance(fields, Mapping):
            raise CorpusError(f"{where} is no compression configuration")
        given = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        try:
            bins = tuple(Bin(**each) for each in given.pop("residual_bins", None) or ())
            terms = tuple(given.pop("polynomial_terms", None) or ())
            found = cls(**given, residual_bins=bins, polynomial_terms=terms)
        except TypeError:
            raise CorpusError(f"{where} lacks d, k or exact_k, or has a residual bin of other fields") from None
        found._check(where)
        return found

    def _check(self, where: str) -> None:
        whole = [self.d, self.k, self.exact_k, *(n for each in self.residual_bins for n in _numbers(each))]
        if any(type(each) is not int for each in whole):
            raise CorpusError(f"{where} has a number that is not whole")
        names = [self.exact_dtype, self.term_dtype, *(each.scale_dtype for each in self.residual_bins)]
        if any(name not in _DTYPES for name in names):
            raise CorpusError(f"{where} has a dtype other than {', '.join(_DTYPES)}")
        if any(term not in ("sqrt", "exp") and type(term) is not int for term in self.polynomial_terms):
            raise CorpusError(f"{where} has a polynomial term other than a power, sqrt or exp")
        bad_bin = any(not 1 <= each.element_bits <= 62 or each.num_elements < 1 for each in self.residual_bins)
        if (
            not 1 <= self.k <= _MOST_K
            or not 0 <= self.exact_k <= self.k
            or not 1 <= self.d < _MOST_VOCABULARY
            or bad_bin
        ):
            raise CorpusError(f"{where} has d {self.d}, k {self.k} and exact_k {self.exact_k}, or bins, out of range")
        if sum(each.num_elements for each in self.residual_bins) > self.k - self.exact_k:
            raise CorpusError(f"{where} has more residuals than entries")

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, math.ceil(math.log2(self.d)))

    def fields(self) -> dict[str, Any]:
        """The mapping of a `compression_config.yaml`."""
        return {
            "d": self.d, "k": self.k, "exact_k": self.exact_k, "exact_dtype": self.exact_dtype,
            "polynomial_terms": list(self.polynomial_terms) or None, "term_dtype": self.term_dtype,
            "residual_bins": [dict(vars(each)) for each in self.residual_bins],
            "delta_encoding": self.delta_encoding, "error_diffusion": False, "normalize_t": self.normalize_t,
        }  # fmt: skip

    def read_values(self, data: NDArray[np.uint8], where: str) -> NDArray[np.float64]:
        """Log-probabilities `[m, k]` from bytes `[m, B]`.

        Raises:
            CorpusError: other bytes than this configuration makes.
        """
        rest = _Bytes(data, where)
        exact = rest.numbers(self.exact_dtype, self.exact_k)
        coefficients = rest.numbers(self.term_dtype, len(self.polynomial_terms))
        others = np.zeros((len(data), self.k - self.exact_k))
        if self.polynomial_terms and others.size:
            others = coefficients @ self._terms(others.shape[1]).T
        start = 0
        for each in self.residual_bins:
            scale = rest.numbers(each.scale_dtype, 1)
            stored = rest.integers(each.element_bits, each.num_elements).astype(np.float64)
            centred = 2 * stored - 1 if each.element_bits == 1 else stored - 2.0 ** (each.element_bits - 1)
            others[:, start : start + each.num_elements] += centred * scale
            start += each.num_elements
        rest.require_end()
        values = np.concatenate([exact, others], -1)
        return np.cumsum(values, -1) if self.delta_encoding else values

    def read_ids(self, data: NDArray[np.uint8], where: str) -> NDArray[np.int64]:
        """Ids `[m, k]` from bytes `[m, B]`."""
        rest = _Bytes(data, where)
        ids = rest.integers(self.id_bits, self.k)
        rest.require_end()
        return ids

    def write_ids(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Bytes `[m, B]` of ids `[m, k]`."""
        shifts = np.arange(self.id_bits - 1, -1, -1)
        bits = (ids[..., None] >> shifts & 1).astype(np.uint8)  # [m, k, bits]
        return np.packbits(bits.reshape(len(ids), -1), axis=-1)

    def write_values(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Bytes `[m, B]` of falling log-probabilities `[m, k]`, all exact, without differences."""
        numbers = torch.from_numpy(values).to(_DTYPES[self.exact_dtype]).contiguous()
        return numbers.view(torch.uint8).numpy().reshape(len(values), -1)

    def _terms(self, count: int) -> NDArray[np.float64]:
        """`[count, terms]` the terms at each t, of the precision that they are computed in."""
        dtype = _DTYPES[self.term_dtype]
        t = torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
        columns = [t**term if isinstance(term, int) else getattr(torch, term)(t) for term in self.polynomial_terms]
        return torch.stack(columns, -1).double().numpy()


def _numbers(each: Bin) -> tuple[int, int]:
    return each.element_bits, each.num_elements


class _Bytes:
    """Bytes `[m, B]` that are read from the first to the last."""

    def __init__(self, data: NDArray[np.uint8], where: str) -> None:
        self._data, self._at, self._where = data, 0, where

    def _next(self, count: int) -> NDArray[np.uint8]:
        part = self._data[:, self._at : self._at + count]
        if part.shape[1] < count:
            raise CorpusError(f"{self._where} has {self._data.shape[1]} bytes a position, fewer than its configuration")
        self._at += count
        return part

    def numbers(self, dtype: str, count: int) -> NDArray[np.float64]:
        """`[m, count]` numbers of a dtype."""
        size = _DTYPES[dtype].itemsize
        data = torch.from_numpy(self._next(count * size).copy())
        return data.view(_DTYPES[dtype]).double().numpy() if count else np.zeros((len(self._data), 0))

    def integers(self, bits: int, count: int) -> NDArray[np.int64]:
        """`[m, count]` integers of some bits each, which fill whole bytes together."""
        data = np.unpackbits(self._next((bits * count + 7) // 8), axis=-1)[:, : bits * count]
        found = np.zeros((len(data), count), np.int64)
        for bit in range(bits):  # one pass a bit, so that no array of `bits` integers an entry is made
            found = found << 1 | data[:, bit::bits]
        return found

    def require_end(self) -> None:
        """Refuse bytes that are left."""
        if self._at != self._data.shape[1]:
            raise CorpusError(
                f"{self._where} has {self._data.shape[1]} bytes a position, but {self._at} are configured"
            )
