"""Lies of a row's content, the same in both stores; each is sealed by the store's own writer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kdcache.store.row_format import Record
from tests.attacks.forge import Attack, Forgery

_HUGE = (1 << 63) - 1
_EXTRA = {"width": 4, "dtype": "float32", "precision": "float16", "per": "token", "error_bound": None}


def _set(at: int, value: int) -> Callable[[Any], Any]:
    def change(stream: Any) -> Any:
        stream[at] = value
        return stream

    return change


def _positions(change: Callable[[int], int]) -> Callable[[Forgery], str]:
    return lambda f: f.write_records(lambda r: Record(positions=change(r.positions), streams=r.streams))


def _stream(**changes: Callable[[Any], Any]) -> Callable[[Forgery], str]:
    return lambda f: f.stream(**changes)


def _overflow(pieces: Any) -> Any:
    """Lengths whose sum wraps around 64 bits to the right one."""
    return [_HUGE, 0, _HUGE, 0, int(pieces[::2].sum()) + 2, 0]


def _split(pieces: Any) -> Any:
    """One piece as two, of a negative length and a longer one."""
    return [-1, pieces[1], int(pieces[0]) + 1, *pieces[1:]]


def _flip(stream: Any) -> Any:
    """One label more, or one less, among the chosen."""
    stream[0] ^= 1
    return stream


def _beyond(stream: Any) -> Any:
    """A bit behind that of the last label; rows of the forged cache have 63, 50 or the like, never a multiple of 8."""
    stream[-1] |= 128
    return stream


CHOSEN = [
    Attack("one chosen more or less", _stream(chosen=_flip)),
    Attack("all chosen", _stream(chosen=lambda s: np.full_like(s, 255))),
    Attack("none chosen", _stream(chosen=np.zeros_like)),
    Attack("no bits", _stream(chosen=lambda s: s[:0])),
    Attack("bits missing", _stream(chosen=lambda s: s[:-1])),
    Attack("bits of another byte", _stream(chosen=lambda s: [*s[: 64 // 8 - 2], 0])),
    Attack("a bit beyond the labels", _stream(chosen=_beyond)),
    Attack("more targets than labels", _positions(lambda n: 64)),
    Attack("a target less than chosen", _positions(lambda n: n - 1)),
    Attack("no targets for the chosen", _positions(lambda n: 0)),
    Attack("a cache that chooses no more", lambda f: (f.change_manifest(positions="all"), "shard")[1]),
]


ATTACKS = [
    Attack("a cache that claims an extra", lambda f: (f.change_manifest(extras={"h": _EXTRA}), "shard")[1]),
    Attack("an extra of a huge width", lambda f: f.change_manifest(extras={"h": {**_EXTRA, "width": 1 << 30}})),
    Attack("an extra of no width", lambda f: f.change_manifest(extras={"h": {**_EXTRA, "width": 0}})),
    Attack("an extra that leads out of the cache", lambda f: f.change_manifest(extras={"../h": _EXTRA})),
    Attack("an extra of another precision", lambda f: f.change_manifest(extras={"h": {**_EXTRA, "precision": "4"}})),
    Attack("an extra that is a number", lambda f: f.change_manifest(extras={"h": 4})),
    Attack("a cache that chooses", lambda f: (f.change_manifest(positions="entropy>1"), "shard")[1]),
    Attack("more targets than slots", _positions(lambda n: 65)),
    Attack("no targets for labels", _positions(lambda n: 0)),
    Attack("one target less", _positions(lambda n: n - 1)),
    Attack("a token outside the vocabulary", _stream(tokens=_set(3, 320))),
    Attack("the largest token", _stream(tokens=_set(0, 65535))),
    Attack("no tokens", _stream(tokens=lambda s: s[:0])),
    Attack("fewer tokens than its pieces", _stream(tokens=lambda s: s[:-1])),
    Attack("no pieces", _stream(pieces=lambda s: s[:0])),
    Attack("half a piece", _stream(pieces=lambda s: s[:-1])),
    Attack("a piece of no length", _stream(pieces=lambda s: [0, 0, *s])),
    Attack("a piece of negative length", _stream(pieces=_split)),
    Attack("pieces whose sum overflows", _stream(pieces=_overflow)),
    Attack("a piece longer than 2^62", _stream(pieces=_set(0, 1 << 62))),
    Attack("a document below zero", _stream(pieces=_set(1, -1))),
    Attack("a document beyond the corpus", _stream(pieces=_set(1, 12))),
    Attack("a mask of another length", _stream(supervised=lambda s: [1, 1, 1])),
    Attack("a mask of more than flags", _stream(tokens=lambda s: s, supervised=lambda s: np.full(64, 2))),
    Attack("an entry outside the vocabulary", _stream(ids=_set(0, 320))),
    Attack("the largest entry", _stream(ids=_set(7, 65535))),
    Attack("entries missing", _stream(ids=lambda s: s[:-1])),
    Attack("values missing", _stream(values=lambda s: s[:-8])),
    Attack("no values", _stream(values=lambda s: s[:0])),
    Attack("scalars missing", _stream(scalars=lambda s: s[:-1])),
    Attack("a value that is no number", _stream(values=_set(0, np.nan))),  # type: ignore[arg-type]
]
