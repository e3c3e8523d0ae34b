"""Uniforms: random numbers that are a function of (seed, shard, row, position) and of nothing else.

A counter-based generator: the words are absorbed one by one by the finaliser of splitmix64 (Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators", figure 15, variant 13), in wrapping 64-bit integers.
Guarantee: the same value on any device, in a batch of any size and order; keys that differ in one word only
never reach the same state. Cost: eight integer operations a word and a number.

Shapes: N positions, D draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SELECT = 0x73656C656374
"""Domain of the numbers that a dump draws."""

NARROW = 0x6E6172726F77
"""Domain of the numbers that narrowing draws: an old uniform used again would bias what it once chose."""

GENERATE = 0x67656E6572617465
"""Domain of the numbers that generated tokens are drawn by."""


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _fold(z: Tensor, bits: int) -> Tensor:
    """`z ^ (z >>> bits)`: torch shifts int64 with its sign, so the sign's copies are masked."""
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def _absorb(state: Tensor, word: Tensor | int) -> Tensor:
    z = (state ^ word) + _STEP
    z = _fold(z, 30) * _FIRST
    z = _fold(z, 27) * _SECOND
    return _fold(z, 31)


def uniforms(seed: int, keys: Tensor, domain: int, draws: int | None = None) -> Tensor:
    """Uniform numbers of positions.

    Args:
        seed: any integer; its low 64 bits count.
        keys: `[N, 3]` int64: shard, row, position; of generated tokens, prompt, sample, step.
        domain: what the numbers are for.
        draws: numbers a position; one, without an axis, if None.

    Returns:
        `[N]` or `[N, D]` float64 in [0, 1), multiples of 2^-53.
    """
    state = torch.full_like(keys[:, 0], _signed(domain))
    words: list[Tensor | int] = [_signed(seed), *keys.unbind(-1)]
    for word in words:
        state = _absorb(state, word)
    if draws is not None:
        state = _absorb(state[:, None], torch.arange(draws, device=keys.device))  # [N, D]
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def default_keys(positions: int, device: torch.device) -> Tensor:
    """`[N, 3]` keys of positions without a number of their own: shard 0, row 0, and their place."""
    keys = torch.zeros(positions, 3, dtype=torch.int64, device=device)
    keys[:, 2] = torch.arange(positions, device=device)
    return keys
