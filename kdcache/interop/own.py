"""kdcache's own caches, as a reader of another tool's gives them: for audits.

Shapes: m targets of a row, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kdcache.cache import open_cache
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import LOGPROBS, WEIGHTS, ForeignCache
from kdcache.interop.pieces import entry_values, slots_with_targets


class OwnCache(ForeignCache):
    """A cache of kdcache. A part is a row.

    Attributes:
        values: log-probabilities, or of sampled kinds weights.
    """

    format = "kdcache"

    def __init__(self, path: str, tokens: str | None = None) -> None:  # noqa: ARG002 - it has its own
        self._cache = open_cache(path, partial=True)
        manifest = self._cache.manifest
        self.vocab_size, self.isolated = manifest.vocab_size, manifest.isolate
        self.tokenizer_sha256 = manifest.tokenizer_sha256 if manifest.tokenizer_files else None
        self.sampled = manifest.rule.sampled
        self.values, self.selection = (WEIGHTS, manifest.rule) if self.sampled else (LOGPROBS, None)
        self._tail = None if self.sampled else manifest.temperatures.index(1.0)

    def parts(self) -> Sequence[Any]:
        """The rows."""
        return range(len(self._cache))

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """One row."""
        packed, targets = self._cache.read_packed(part)
        slots, kept = slots_with_targets(packed, targets)
        values = entry_values(kept)
        tail = None if kept.log_tail is None else kept.log_tail[:, self._tail].double().numpy()
        yield ForeignRow(
            tokens=packed.tokens.astype(np.int64), slots=slots, ids=kept.ids.numpy().astype(np.int64),
            values=np.exp(values) if self.sampled else values, count=kept.count.numpy().astype(np.int64),
            label_logprob=None if kept.label_logprob is None else kept.label_logprob.double().numpy(), log_tail=tail,
            piece_lengths=packed.piece_lengths.astype(np.int64), where=f"row {part} of the cache",
        )  # fmt: skip
