"""Extras: further dense arrays of a row, by name, one vector a token or a position.

A cache may hold more than targets: hidden states of a layer, for example. The manifest names each extra and gives its
`ExtraSpec`. The row format stores its streams behind those of the targets, under the same seals and hashes.

Streams of an extra of N vectors, little-endian, vector after vector:

    float32, float16   values [N, width]
    bfloat16           [N, width] uint16: the upper half of each float32, rounded to the nearest even
    int8               [N, width] int8, from -127 to 127; a float32 scale a vector: max|x| / 127 over all but its m
                       largest numbers; and these m apart, as they are: `apart` [N, m] float32 and their `channel`
                       [N, m], rising, where `values` is 0

A hidden state has a few channels that are hundreds of times as large as the others (arXiv 2402.17762). With one scale
for all, little is left of the others, so `int8` keeps them apart: m = 8 of each vector, but at most one of 16.

Guarantee: `float32` loses nothing; `error_bound` bounds what the others lose. NaN and infinity are refused when
written, and whatever is read is finite. Decoding trusts nothing. Which numbers are kept apart does not depend on the
machine: of equal ones the first.
Cost: a few vectorised passes.

Shapes: N vectors, W their width, m of them apart, L slots a row, n tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError, CorruptCacheError, TargetError
from kdcache.lazy_torch import torch

Floats = NDArray[np.float32]
Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
Streams = dict[str, NDArray[Any]]

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""How values can be stored."""

OWNERS = ("token", "position")
"""What can have a vector: each token of a row, or each labelled position."""

MOST_EXTRAS = 64

WRITER_LOGP = "writer_logp"
"""The extra that the records of a corpus bring: the log-probability that each token had when its writer drew it, in
nats. 0 for a token that no writer drew, which is never a label."""

_NAME = re.compile(r"[a-z0-9_.:-]{1,80}")
_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
_SINGLE = np.dtype("<f4")
_LEVELS = 127
_MOST_APART, _APART_SHARE = 8, 16
_ROUNDING = 1 + 1e-6
"""Of scales and products, which are float32."""
_LARGEST_SCALE = np.nextafter(np.float32(np.finfo(np.float32).max / _LEVELS), np.float32(0))


@dataclass(frozen=True, kw_only=True)
class ExtraSpec:
    """What one extra holds, and how it is stored.

    Attributes:
        width: W, numbers of a vector.
        dtype: of the numbers that a reader gets; `float32`.
        precision: how they are stored: `float32`, `float16`, `bfloat16`, or `int8` with one float32 scale a vector
            and its largest numbers apart.
        per: `token`: a vector for each of a row's n tokens; `position`: one for each labelled slot, in slot order.

    Raises:
        ConfigError: a width below 1, or a dtype, a precision or an owner that does not exist.
    """

    width: int
    dtype: str = "float32"
    precision: str = "float32"
    per: str = "token"

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 1 <= self.width < 1 << 31:
            raise ConfigError(f"width of an extra is {self.width!r}, outside 1 to 2^31 - 1")
        if self.dtype != "float32":
            raise ConfigError(f"dtype of an extra is {self.dtype!r}, but must be float32")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision of an extra is {self.precision!r}, not one of {', '.join(PRECISIONS)}")
        if self.per not in OWNERS:
            raise ConfigError(f"per of an extra is {self.per!r}, not one of {', '.join(OWNERS)}")

    @property
    def apart(self) -> int:
        """How many numbers of each vector are stored apart."""
        return min(_MOST_APART, self.width // _APART_SHARE) if self.precision == "int8" else 0

    @property
    def error_bound(self) -> float | None:
        """The largest |x - stored x| / |x| of any vector x, in the Euclidean norm. None: it depends on its numbers.

        `int8`: each of the W - m numbers that are not apart is off by M / 254 at most, where M is the largest of them;
        and the m apart are not smaller, so |x| is at least M sqrt(m + 1). `bfloat16`: half a step of its 8 bits.
        `float16` has none: numbers below 6e-5 lose bits.
        """
        if self.precision == "int8":
            return _ROUNDING * math.sqrt(self.width - self.apart) / (2 * _LEVELS * math.sqrt(self.apart + 1))
        return {"float32": 0.0, "bfloat16": 2.0**-8}.get(self.precision)

    def to_fields(self) -> dict[str, Any]:
        """The JSON object in a manifest."""
        return {**dataclasses.asdict(self), "error_bound": self.error_bound}

    def shapes(self, vectors: int) -> Shapes:
        """Type and largest shape of each stream of so many vectors, in order; `values` is the first."""
        shapes: Shapes = {"values": (_TYPES[self.precision], (vectors, self.width))}
        if self.precision == "int8":
            shapes["scale"] = (_SINGLE, (vectors,))
        if self.apart:
            shapes["apart"] = (_SINGLE, (vectors, self.apart))
            shapes["channel"] = (np.dtype("<u2" if self.width <= 1 << 16 else "<u4"), (vectors, self.apart))
        return shapes

    def encode(self, values: NDArray[Any] | torch.Tensor) -> Streams:
        """Pack vectors `[N, W]` of any float type into 1-D streams.

        Raises:
            TargetError: another shape, a number that is not finite, or one that the precision cannot hold.
        """
        single = _as_single(values)
        if single.ndim != 2 or single.shape[1] != self.width:
            raise TargetError(f"it has the shape {list(single.shape)}, not [vectors, {self.width}]")
        if not np.isfinite(single).all():
            raise TargetError("it holds NaN or an infinite number")
        if self.precision == "int8":
            return self._encode_int8(single)
        stored = _to_bfloat16(single) if self.precision == "bfloat16" else _cast(single, _TYPES[self.precision])
        if not np.isfinite(self._widen(stored)).all():
            largest = np.abs(single).max()
            raise TargetError(f"it holds a number of size {largest:g}, which {self.precision} cannot hold")
        return {"values": stored.reshape(-1)}

    def decode(self, streams: Mapping[str, NDArray[Any]], vectors: int) -> Floats:
        """Unpack vectors; nothing in `streams` is trusted.

        Returns:
            `[N, W]` finite float32.

        Raises:
            CorruptCacheError: a stream of another length or type, a scale that is negative or huge, a number that is
                not finite, or a channel outside the vector or twice.
        """
        for name, (dtype, shape) in self.shapes(vectors).items():
            found, size = streams[name], int(np.prod(shape))
            if found.dtype != dtype or found.shape != (size,):
                raise CorruptCacheError(f"its {name} are {found.size} numbers, not {size}")
        stored = streams["values"].reshape(vectors, self.width)
        if self.precision == "int8":
            scale = streams["scale"]
            if not ((scale >= 0) & (scale <= _LARGEST_SCALE)).all():  # a comparison with NaN is false
                raise CorruptCacheError("its scale is negative, too large or no number")
            if (stored == -128).any():
                raise CorruptCacheError("its values go below -127")
            values = np.asarray(stored * scale[:, None], np.float32)
            if self.apart:
                self._put_back(values, streams, vectors)
            return values
        values = self._widen(stored)
        if not np.isfinite(values).all():
            raise CorruptCacheError("its values are not all finite")
        return values

    def _encode_int8(self, values: Floats) -> Streams:
        """The streams of finite vectors."""
        apart: Streams = {}
        if self.apart:
            own = _largest(np.abs(values), self.apart)
            channels = np.nonzero(own)[1].reshape(-1, self.apart)
            kept = np.take_along_axis(values, channels, -1)
            channel_type = self.shapes(0)["channel"][0]
            apart = {"apart": kept.astype(_SINGLE).reshape(-1), "channel": channels.astype(channel_type).reshape(-1)}
            values = np.where(own, np.float32(0), values)
        largest = np.abs(values).max(-1, initial=0).astype(np.float64)
        scale = np.minimum((largest / _LEVELS).astype(_SINGLE), _LARGEST_SCALE)
        steps = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
        levels = np.rint(values / steps).clip(-_LEVELS, _LEVELS)
        return {"values": levels.astype(np.int8).reshape(-1), "scale": scale, **apart}

    def _put_back(self, values: Floats, streams: Mapping[str, NDArray[Any]], vectors: int) -> None:
        """Write the numbers apart into their channels.

        Raises:
            CorruptCacheError: a channel outside the vector or twice, or a number that is not finite.
        """
        channels = streams["channel"].reshape(vectors, self.apart).astype(np.int64)
        kept = streams["apart"].reshape(vectors, self.apart)
        if (channels >= self.width).any() or (np.diff(channels, axis=-1) <= 0).any():
            raise CorruptCacheError("its channels lie outside the vector or do not rise")
        if not np.isfinite(kept).all():
            raise CorruptCacheError("its numbers apart are not all finite")
        np.put_along_axis(values, channels, kept, -1)

    def _widen(self, stored: NDArray[Any]) -> Floats:
        if self.precision == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def read_specs(fields: Mapping[str, Any]) -> dict[str, ExtraSpec]:
    """The extras that a manifest names, in order of name.

    Raises:
        ConfigError: a name with other characters than `a-z 0-9 _ . : -`, an unknown field, or see `ExtraSpec`.
    """
    if len(fields) > MOST_EXTRAS:
        raise ConfigError(f"{len(fields)} extras are above the limit of {MOST_EXTRAS}")
    found = {}
    for name in sorted(fields):
        require_name(name)
        spec = fields[name]
        if not isinstance(spec, dict) or set(spec) != {*(f.name for f in dataclasses.fields(ExtraSpec)), "error_bound"}:
            raise ConfigError(f"extra {name} does not have the fields of an extra")
        found[name] = ExtraSpec(**{field: value for field, value in spec.items() if field != "error_bound"})
        if found[name].error_bound != spec["error_bound"]:
            wanted = found[name].error_bound
            raise ConfigError(f"extra {name} has an error_bound of {spec['error_bound']!r}, but should have {wanted!r}")
    return found


def require_name(name: str) -> None:
    """Refuse what cannot name an extra.

    Raises:
        ConfigError: it is empty, longer than 80 characters, or has others than `a-z 0-9 _ . : -`.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:100]!r} cannot name an extra; a name has 1 to 80 characters of a-z 0-9 _ . : -")


def stream_names(name: str, spec: ExtraSpec) -> dict[str, str]:
    """What the streams of an extra are called in a row: `extra.NAME`, and of `int8` also `scale.NAME` and so on.

    Zarr stores make folders of these names, so `:`, which some file systems refuse, is written `~`.
    """
    safe = name.replace(":", "~")
    return {part: f"{'extra' if part == 'values' else part}.{safe}" for part in spec.shapes(0)}


def _as_single(values: NDArray[Any] | torch.Tensor) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float32).numpy()
    return _cast(np.asarray(values), _SINGLE)


def _cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what becomes infinite is refused by the caller
        return np.ascontiguousarray(values, dtype)


def _to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16).astype("<u2")


def _largest(sizes: Floats, count: int) -> NDArray[np.bool_]:
    """`[N, W]` the `count` largest of each vector; of equal ones the first."""
    least = np.partition(sizes, sizes.shape[1] - count, axis=-1)[:, -count, None]
    above, equal = sizes > least, sizes == least
    wanted = count - above.sum(-1, keepdims=True)
    found: NDArray[np.bool_] = above | (equal & (np.cumsum(equal, -1) <= wanted))
    return found
