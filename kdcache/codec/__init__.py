"""Codec: SparseTargets of one row to named streams of bytes, and back.

    plain.py    float32 or float16 values, nothing compressed
    compact.py  4 to 16 bits a value, ids by rank, everything under zstd
    streams.py  the names of the streams, and reading them safely

Both have `encode(targets) -> streams` and `decode(streams, positions) -> targets`, and neither trusts what it decodes.
"""

from __future__ import annotations

from kdcache.codec.compact import BITS, CompactCodec
from kdcache.codec.plain import PRECISIONS, PlainCodec
from kdcache.codec.streams import STREAMS
from kdcache.errors import ConfigError

Codec = PlainCodec | CompactCodec

__all__ = ["STREAMS", "Codec", "make_codec"]


def make_codec(
    *,
    kind: str,
    width: int,
    vocab_size: int,
    temperatures: tuple[float, ...],
    precision: str,
    id_order: tuple[int, ...] = (),
) -> Codec:
    """The codec that a manifest describes.

    Raises:
        ConfigError: a precision that is neither a float's name nor a number of bits.
    """
    if precision in PRECISIONS:
        return PlainCodec(kind=kind, width=width, vocab_size=vocab_size, temperatures=temperatures, precision=precision)
    if not precision.isdecimal() or int(precision) not in BITS:
        raise ConfigError(
            f"--precision {precision} is not one of {', '.join(PRECISIONS)}, or {BITS.start} to {BITS.stop - 1} bits"
        )
    return CompactCodec(
        kind=kind, width=width, vocab_size=vocab_size, temperatures=temperatures, bits=int(precision), id_order=id_order
    )
