"""Codec: SparseTargets of one row to named streams of numbers, and back. Stores compress each stream by itself.

    layout.py     what is known of all targets of a cache, and Codec: what a store may call
    plain.py      float32 or float16 values
    compact.py    4 to 16 bits a value, ids by rank
    weighted.py   entries with free weights, by either of the two
    lights.py     entries of sampled targets without a probability of their own
    id_ranks.py   ids by how often they are proposed
    id_deltas.py  sorted ranks in a byte each
    quantizer.py  values in a few bits
    scalars.py    the numbers that a position has one of
    streams.py    compression, and how streams are checked when read

No codec trusts what it decodes: it raises CorruptCacheError, reads nothing out of bounds, and allocates no more than
a row of its layout needs.
"""

from __future__ import annotations

import dataclasses

from kdcache.codec.compact import CompactCodec
from kdcache.codec.layout import Codec, Layout
from kdcache.codec.plain import PRECISIONS, PlainCodec
from kdcache.codec.quantizer import BITS
from kdcache.codec.streams import LEVEL, deflate, inflate
from kdcache.codec.weighted import WeightedCodec
from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError

__all__ = ["LEVEL", "Codec", "Layout", "deflate", "inflate", "make_codec"]


def make_codec(layout: Layout, precision: str, id_order: tuple[int, ...] = ()) -> Codec:
    """The codec that a manifest describes.

    Args:
        layout: of the targets.
        precision: `float32`, `float16`, or bits of a value, `4` to `16`.
        id_order: ids by falling frequency, for a number of bits.

    Raises:
        ConfigError: a precision that is neither a float's name nor a number of bits.
        CorruptCacheError: an order that repeats an id or names one outside the vocabulary.
    """
    if layout.form.free_weights:
        form = EntryForm(sampled=True, ragged=True, most_heavies=None)
        inner = make_codec(dataclasses.replace(layout, form=form), precision, id_order)
        return WeightedCodec(layout=layout, inner=inner, exact=precision == "float32")
    if precision in PRECISIONS:
        return PlainCodec(layout=layout, precision=precision)
    if not precision.isdecimal() or int(precision) not in BITS:
        raise ConfigError(
            f"precision is {precision}, but must be {', '.join(PRECISIONS)}, or {BITS.start} to {BITS.stop - 1} bits"
        )
    return CompactCodec(layout=layout, bits=int(precision), id_order=id_order)
