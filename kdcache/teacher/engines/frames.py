"""Frames: how an engine and its process talk over a pipe.

A frame is 8 bytes of length (little-endian) and so many bytes in the form of safetensors: arrays by name, and JSON in
its metadata. Nothing is unpickled. What the other side sends is not believed: a frame above a limit, bytes that are not
safetensors, or metadata that is not a JSON object is a `FrameError`.
Cost: one copy of the arrays at each end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

Arrays = dict[str, NDArray[Any]]

_LENGTH = struct.Struct("<Q")
_FIELD = "kdcache"

MOST_BYTES = 1 << 36
"""Length of a frame at most."""


class FrameError(Exception):
    """Bytes that are not a frame."""


def pack_frame(message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A frame of a JSON object and some arrays."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = save(plain, {_FIELD: json.dumps(message)})
    return _LENGTH.pack(len(data)) + data


def read_frame(read: Callable[[int], bytes]) -> tuple[dict[str, Any], Arrays] | None:
    """The next frame; None where the other side has closed the pipe.

    Args:
        read: reads exactly so many bytes, or fewer at the end.

    Raises:
        FrameError: it is none.
    """
    head = read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise FrameError("a frame that ends early")
    (length,) = _LENGTH.unpack(head)
    if length > MOST_BYTES:
        raise FrameError(f"a frame of {length:,} bytes")
    data = read(length)
    if len(data) < length:
        raise FrameError("a frame that ends early")
    try:
        arrays = load(data)
        (size,) = _LENGTH.unpack(data[: _LENGTH.size])
        message = json.loads(json.loads(data[_LENGTH.size :][:size])["__metadata__"][_FIELD])
    except Exception as error:  # of safetensors, struct, JSON, or a key
        raise FrameError(f"bytes that are no frame ({type(error).__name__})") from error
    if not isinstance(message, dict):
        raise FrameError("a frame without a message")
    return message, arrays
