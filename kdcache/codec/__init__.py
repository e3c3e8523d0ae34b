"""Codec: SparseTargets of one row to named streams of numbers, and back. Stores compress each stream by itself.

    interface.py  Codec: what a store may ask
    plain.py      float32 or float16 values
    compact.py    4 to 16 bits a value, ids by rank
    weighted.py   draws with importance weights, by either of the two
    layout.py     what a manifest says of targets before any is read
    order.py      ids by how often they are proposed
    runs.py       sorted ranks in a byte each
    levels.py     values in a few bits
    numbers.py    what a position has one of
    sampled.py    weights of sampled kinds
    streams.py    compression, and reading safely
    packing.py    the loops that make streams
    unpacking.py  the loops that make targets
    arrays.py     the types that they speak of

No codec trusts what it decodes: it raises CorruptCacheError, reads nothing out of bounds, and allocates no more than
a row of its layout needs.
"""

from __future__ import annotations

from kdcache.codec.compact import CompactCodec
from kdcache.codec.layout import Codec, Layout
from kdcache.codec.plain import PRECISIONS, PlainCodec
from kdcache.codec.quantizer import BITS
from kdcache.codec.streams import LEVEL, deflate, inflate
from kdcache.codec.weighted import WeightedCodec
from kdcache.errors import ConfigError

__all__ = ["LEVEL", "Codec", "deflate", "inflate", "make_codec"]


def make_codec(
    *,
    kind: str,
    width: int,
    vocab_size: int,
    temperatures: tuple[float, ...],
    precision: str,
    id_order: tuple[int, ...] = (),
    draws: int | None = None,
    force_label: bool = False,
    sample_temperature: float = 1.0,
    weighted: bool = False,
) -> Codec:
    """The codec that a manifest describes.

    Args:
        kind: the selection.
        width: K, the most entries of a position.
        vocab_size: ids lie below it.
        temperatures: T of each stored partition and tail.
        precision: `float32`, `float16`, or bits of a value, `4` to `16`.
        id_order: ids by falling frequency, for a number of bits.
        draws: N of `sample`.
        force_label: whether `sample` keeps the label apart from its draws.
        sample_temperature: T of the p_T that sampled weights estimate.
        weighted: whether the weights of `sample` are importance weights and no counts of draws.

    Raises:
        ConfigError: a precision that is neither a float's name nor a number of bits, or settings that no selection has.
        CorruptCacheError: an order that repeats an id or names one outside the vocabulary.
    """
    layout = Layout(
        kind=kind,
        width=width,
        vocab_size=vocab_size,
        temperatures=temperatures,
        draws=draws,
        force_label=force_label,
        sample_temperature=sample_temperature,
    )
    if weighted:
        inner = make_codec(
            kind="ipps", width=width, vocab_size=vocab_size, temperatures=temperatures, precision=precision,
            id_order=id_order, sample_temperature=sample_temperature,
        )  # fmt: skip
        return WeightedCodec(layout=layout, inner=inner, exact=precision == "float32")
    if precision in PRECISIONS:
        return PlainCodec(layout=layout, precision=precision)
    if not precision.isdecimal() or int(precision) not in BITS:
        raise ConfigError(
            f"--precision {precision} is not one of {', '.join(PRECISIONS)}, or {BITS.start} to {BITS.stop - 1} bits"
        )
    return CompactCodec(layout=layout, bits=int(precision), id_order=id_order)
