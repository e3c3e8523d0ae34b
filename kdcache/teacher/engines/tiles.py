"""Tiles: how many positions have their logits in memory at once.

Importing this loads torch and nothing else.
"""

from __future__ import annotations

import numpy as np
import torch

TILE_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a tile, by device; others do as a GPU does. On a CPU 16 MiB, which malloc hands out again; above 32 MiB
it takes fresh pages each time, which costs more than all the calls of small tiles (docs/decisions/0006)."""

GPU_TILES = 6
"""Tiles of a batch at most, on a GPU: a selection is a hundred small operations or more, however few its positions."""

_MOST_LOGITS = 1 << 28
"""Logits of a tile at most, however large the batch is."""

_LEAST_POSITIONS = 128
"""Positions of a tile at least, however large the vocabulary: each tile reads all of the head's weights."""


def tile_slices(positions: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Tiles of about equal size that hold so many positions together; at least one.

    Of equal size, because a last one of a few positions would cost as much as a full one.
    """
    size = TILE_LOGITS.get(device.type, TILE_LOGITS["cuda"])
    if device.type != "cpu":
        size = max(size, min(_MOST_LOGITS, -(-positions // GPU_TILES) * vocab_size))
    tiles = max(1, -(-positions // max(_LEAST_POSITIONS, size // vocab_size)))
    small, larger = divmod(positions, tiles)
    ends = np.cumsum([small + (i < larger) for i in range(tiles)]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
