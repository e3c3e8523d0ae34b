"""Mixed shard: some contexts of its rows are copied from other caches, the others come from the teacher.

Each row is put together in the order of its contexts. What is copied stays as it is stored; what is new is encoded as
in any other shard. So the shard has the rows of one made from nothing, and in them the same targets but for the last
bits of what the teacher computes in another batch.
Cost: reading, cutting and joining rows in a thread of its own, during the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from kdcache.cache_writer import NewShard
from kdcache.corpus.packing import PackedRows
from kdcache.rows import PackedRow, labelled_tokens
from kdcache.store.manifest import Manifest
from kdcache.store.row_format import Part, Record
from kdcache.targets import SparseTargets
from kdcache.teacher.background_writer import BackgroundWriter
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.missing_rows import Computed, Place, compute
from kdcache.teacher.opened_teacher import OpenedTeacher
from kdcache.teacher.reuse import Found, Reuse

_ROWS = 8
"""Rows that are put together at once."""


class MixedShard:
    """Writes the rows of one shard.

    Args:
        shard: where to.
        manifest: of its cache.
        rows: of the shard.
        reuse: what others hold.
        found: where in them each context is.

    Attributes:
        positions: targets that were copied so far.
    """

    def __init__(self, shard: NewShard, manifest: Manifest, rows: PackedRows, reuse: Reuse, found: Found) -> None:
        self._shard, self._rows, self._reuse, self._found = shard, rows, reuse, found
        self._form, self._spec, self._filter = manifest.row_format, manifest.row_spec, manifest.position_filter
        self._request = TargetRequest.of(manifest)
        self.positions = 0

    def write(
        self, teacher: OpenedTeacher | None, wrote: Callable[[PackedRow], None], on_batch: Callable[[int, int], None]
    ) -> float:
        """Write all rows.

        Args:
            teacher: runs what is missing; None where nothing is.
            wrote: called with each row that is written.
            on_batch: called with rows and labelled slots when the teacher is done with them.

        Returns:
            For how many seconds the teacher waited for encoding and writing.
        """
        known = self._found.known
        coming = iter(()) if teacher is None else compute(self._rows, known, teacher, self._request, self._shard.number)
        waiting: dict[Place, Computed] = {}
        with BackgroundWriter() as background:
            for first in range(0, len(self._rows), _ROWS):
                numbers = range(first, min(first + _ROWS, len(self._rows)))
                new = {}
                for place in [(row, int(i)) for row in numbers for i in np.flatnonzero(~known[row])]:
                    while place not in waiting:
                        made, computed = next(coming)
                        waiting[made] = computed
                    new[place] = waiting.pop(place)
                background.submit(functools.partial(self._write, numbers, new, wrote))
                rows = self._rows[numbers.start : numbers.stop]
                on_batch(len(rows), sum(int(labelled_tokens(row).sum()) for row in rows))
            background.finish()
            return background.stalled_seconds

    def _write(self, numbers: range, new: dict[Place, Computed], wrote: Callable[[PackedRow], None]) -> None:
        self._reuse.read_ahead(self._found.places[numbers.start : numbers.stop])
        for number in numbers:
            row = self._rows[number]
            if self._found.known[number].any():
                targets, record = self._copied(row, number, new)
                self._shard.write_row(row, targets, record=record)
            else:
                made = [new[number, index] for index in range(len(self._found.known[number]))]
                extras = {name: torch.cat([each.extras[name] for each in made]) for name in self._request.extras}
                self._shard.write_row(row, SparseTargets.cat([each.targets for each in made]), extras)
            wrote(row)

    def _copied(self, row: PackedRow, number: int, new: dict[Place, Computed]) -> tuple[SparseTargets, Record]:
        """Targets and record of a row of which something is copied."""
        places, known = self._found.places[number], self._found.known[number]
        if known.all() and self._found.same_order[places[0, 0]]:
            found = self._reuse.whole(places, row, self._form)
            if found is not None:
                self.positions += found[1].positions
                return found
        labelled, parts = labelled_tokens(row), []
        for index, tokens in enumerate(self._spec.contexts(row)):
            if known[index]:
                prefix = row.prefix(index)
                parts.append(self._reuse.part(places[index], row.tokens[tokens], labelled[tokens], prefix))
                self.positions += int((parts[-1].targets.count > 0).sum())
            else:
                parts.append(self._encoded(new[number, index]))
        return self._form.join(row, parts)

    def _encoded(self, computed: Computed) -> Part:
        """What will be stored of a context that the teacher has run."""
        kept = self._filter.apply(computed.targets)
        record = self._form.pack(computed.row, kept, computed.extras)
        return self._form.cut(record, computed.row, kept, [slice(0, len(computed.row.tokens))])[0]
