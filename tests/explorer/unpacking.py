"""The other side of `kdcache.explorer.payload`, written from its description."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def unpack(payload: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
    data, found, start = zlib.decompress(base64.b64decode(payload["data"])), {}, 0
    for name, length, width in payload["arrays"]:
        planes = np.frombuffer(data, np.uint8, length * width, start).reshape(width, length).astype(np.int64)
        found[name] = sum((planes[w] << 8 * w for w in range(width)), np.zeros(length, np.int64))
        start += length * width
    assert start == len(data)
    return found


def nats(values: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(values == 0, np.nan, (values - 1) / 2048)


def ratios(values: NDArray[np.int64]) -> NDArray[np.float64]:
    zigzag = values - 1
    return np.where(values == 0, -np.inf, np.where(zigzag % 2, -(zigzag + 1) // 2, zigzag // 2) / 1024)
