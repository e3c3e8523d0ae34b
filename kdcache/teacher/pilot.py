"""The pilot: what must be known before the first shard, from the first rows of the corpus alone.

Run by whoever creates the cache and kept in its manifest; everyone else reads it there.
"""

from __future__ import annotations

import numpy as np

from kdcache.codec.compact import CompactCodec
from kdcache.selection import Selection
from kdcache.teacher.forward import Teacher
from kdcache.teacher.inputs import Inputs

_POSITIONS = 1 << 14


def id_order(teacher: Teacher, inputs: Inputs) -> tuple[int, ...]:
    """Ids that the teacher proposes in the first rows, most often first (ties: the smaller id first).

    Empty if the codec has no use for an order. Cost: a forward pass over about 16 thousand positions.
    """
    manifest = inputs.manifest
    if not isinstance(manifest.codec, CompactCodec):
        return ()
    counts, positions = np.zeros(manifest.vocab_size, np.int64), 0
    rows = (row for shard in range(manifest.shards) for row in inputs.shard_rows(shard).rows)
    for row in rows:
        targets, _ = teacher.run([row], manifest, Selection(**manifest.selection))
        counts += np.bincount(targets.ids.numpy().ravel(), minlength=manifest.vocab_size)
        positions += len(targets.count)
        if positions >= _POSITIONS:
            break
    order = np.argsort(-counts, kind="stable")
    return tuple(order[: np.count_nonzero(counts)].tolist())
