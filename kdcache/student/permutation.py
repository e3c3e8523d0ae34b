"""Permutation: a pseudo-random order of any number of rows, of which any place can be computed by itself.

A list of 10^9 shuffled rows takes 8 GB. This is a Feistel network over pairs instead: row x is (x // b, x mod b) with
a b >= n, and each round adds a hash of one half to the other, modulo its range, which can be undone whatever the hash
is; values that land beyond n go through it again ("cycle walking"). So it is a bijection of n rows by construction, in
no memory, the same on every machine. The construction is the generalised Feistel cipher of Black and Rogaway, "Ciphers
with Arbitrary Finite Domains" (CT-RSA 2002); the hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014), with a key a round from numpy's `SeedSequence`.

Cost: some 0.2 microseconds a row, in blocks.

Shapes: S places asked for at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 8
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A bijection of 0 to n - 1.

    Args:
        n: how many rows there are, from 1 to 2^62.
        seed: whole numbers; another list is another permutation.
    """

    def __init__(self, n: int, seed: Sequence[int]) -> None:
        self.n = n
        high = math.isqrt(n - 1) + 1
        self._ranges = np.uint64(high), np.uint64(-(-n // high))
        self._keys = np.random.SeedSequence(list(seed)).generate_state(_ROUNDS, np.uint64)

    def __call__(self, places: Ints) -> Ints:
        """`[S]` the rows at these places, each from 0 to n - 1."""
        found = self._once(places.astype(np.uint64))
        beyond = np.flatnonzero(found >= self.n)
        while len(beyond):
            again = self._once(found[beyond])
            found[beyond] = again
            beyond = beyond[again >= self.n]
        return found.astype(np.int64)

    def _once(self, values: Words) -> Words:
        high, low = np.divmod(values, self._ranges[1])
        for number, key in enumerate(self._keys):
            if number % 2:
                low = (low + _hash(high, key) % self._ranges[1]) % self._ranges[1]
            else:
                high = (high + _hash(low, key) % self._ranges[0]) % self._ranges[0]
        return high * self._ranges[1] + low


def _hash(values: Words, key: np.uint64) -> Words:
    mixed = values + key  # modulo 2^64, as all that follows
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))
