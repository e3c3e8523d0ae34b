"""A teacher that is open: from what its engine gives to targets, the same way for every engine.

Head tiles, selection, checks, and the search for the document whose logits are bad are here and nowhere else. Nothing
but sparse targets (and the extra arrays that were asked for) leaves the device.
Cost above the engine's own: the selection, and in memory the logits of one tile of positions.

Shapes: N labelled slots of a batch, n of a tile, V the vocabulary of the head (padding included), K entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import EngineError, LogitsError
from kdcache.rows import PackedRow, RowSpec
from kdcache.selection import draws, require_finite, select_ahead, select_device
from kdcache.selection.target_faults import drop_unknown, find_fault
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import Engine, EngineOutput, HiddenStates, Logits, TargetRequest
from kdcache.teacher.engines.batch import Batch, send
from kdcache.teacher.engines.tiles import tile_slices
from kdcache.teacher.prefixed_rows import teacher_batches


@dataclass(frozen=True, kw_only=True)
class BatchTargets:
    """What a teacher gives for a batch; positions are its labelled slots, in order.

    Attributes:
        targets: of all N positions, on the CPU.
        counts: positions of each row.
        extras: `[tokens, width]` by name, on the CPU, one vector for each token of the batch.
    """

    targets: SparseTargets
    counts: list[int]
    extras: dict[str, Tensor] = field(default_factory=dict)


class OpenedTeacher:
    """A teacher that was opened by `open_teacher`. Use it as a context manager, or call `close`.

    Attributes:
        engine: what runs it.
        rows: the shape of the rows that it is given; longer than its student's where it reads more.
        batch_rows: rows a forward pass.
        compute: what a commit records about how its numbers were made.
    """

    def __init__(self, engine: Engine, rows: RowSpec, batch_rows: int) -> None:
        self.engine, self.rows, self.batch_rows = engine, rows, batch_rows
        self.compute = {"engine": engine.name, **engine.describe(), "batch_rows": batch_rows}

    @property
    def device(self) -> torch.device:
        """Where the engine's logits come out."""
        return torch.device(self.engine.device)

    def targets(
        self, rows: Sequence[PackedRow], request: TargetRequest, *, shard: int = 0, first_row: int = 0
    ) -> BatchTargets:
        """Targets of the labelled slots of some rows.

        Args:
            rows: one batch, all of one shard.
            request: what is asked.
            shard: theirs.
            first_row: the number of the first of them in it.

        Raises:
            LogitsError: NaN or infinite logits, with the document and offset.
            EngineError: the engine gave something else than was asked.
        """
        return next(self.targets_of_batches([Batch(rows, self.rows, shard, first_row)], request))

    def targets_of(
        self, batches: Iterable[Sequence[PackedRow]], request: TargetRequest, *, shard: int = 0
    ) -> Iterator[BatchTargets]:
        """Targets of batch after batch, the rows of a shard from its first on; see `targets_of_batches`."""

        def in_order() -> Iterator[Batch]:
            first_row = 0
            for rows in batches:
                yield Batch(rows, self.rows, shard, first_row)
                first_row += len(rows)

        return self.targets_of_batches(in_order(), request)

    def targets_of_batches(self, batches: Iterable[Batch], request: TargetRequest) -> Iterator[BatchTargets]:
        """Targets of batch after batch; see `targets`.

        The engine is given a few batches (`Engine.lookahead`) before what it gave for the first is looked at and
        written. Rows whose pieces the teacher reads behind a context of its own are given to it as `teacher_batches`
        makes them.
        """
        started: deque[tuple[Batch, list[_StartedBatch]]] = deque()
        for batch in batches:
            parts = teacher_batches(batch, self.rows, self.batch_rows)
            started.append((batch, [self._start(part, request) for part in parts]))
            if len(started) > self.engine.lookahead:
                yield _finished(*started.popleft())
        while started:
            yield _finished(*started.popleft())

    @torch.inference_mode()
    def logits(self, rows: Sequence[PackedRow], *, every_slot: bool = False) -> Iterator[Tensor]:
        """Logits of the labelled slots of some rows, in order, in tiles `[n, vocab_size]`.

        Args:
            rows: one batch.
            every_slot: the logits of every token's slot instead.

        Raises:
            EngineError: the engine gives ready entries, and no logits.
        """
        for part in teacher_batches(Batch(rows, self.rows, every_slot=every_slot), self.rows, self.batch_rows):
            yield from self._tiles(self._logits_given(part))

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """`[vocab_size]` logits of what follows some tokens."""
        row = PackedRow(
            tokens=np.asarray(tokens, np.int32), piece_lengths=np.array([len(tokens)], np.int32),
            piece_documents=np.zeros(1, np.int64),
        )  # fmt: skip
        return list(self.logits([row], every_slot=True))[-1][-1]

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @torch.inference_mode()
    def _start(self, batch: Batch, request: TargetRequest) -> _StartedBatch:
        """Give the engine a batch and the device its selection, and do not wait for them."""
        near = select_device(self.device)
        draw, labels = draws(request.selection, request.seed, send(batch.keys, near)), send(batch.labels, near)
        output = self._run(batch, request)
        self._require_extras(output, batch, request)
        started = _StartedBatch(self, batch, output, to_cpu=request.selection.form.every_id)
        if isinstance(output.positions, SparseTargets):
            if output.finite is not None:
                self.require_finite(output.finite, batch, search=False)
            started.take(self._checked(output.positions, batch, request))
            return started
        for logits in self._tiles(output.positions):  # [n, V]
            tile = slice(started.positions, started.positions + len(logits))
            logits = logits.to(select_device(logits.device))
            part = None if draw is None else draw[tile].to(logits.device)
            here = labels[tile].to(logits.device)
            started.add(*select_ahead(logits, request.selection, here, request.temperatures, part))
            del logits  # before the next tile is made
        started.send()
        return started

    def _run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        """What the engine gives, for as many positions as there are labelled slots."""
        output = self.engine.run(batch, request)
        given = output.positions
        self._require_count(len(given.count if isinstance(given, SparseTargets) else given), batch)
        return output

    def _require_count(self, found: int, batch: Batch) -> None:
        if found != len(batch.slots):
            raise EngineError(
                f"the engine {self.engine.name} gave {found} positions for {len(batch.slots)} labelled slots"
            )

    def _logits_given(self, batch: Batch) -> HiddenStates | Logits:
        given = self.engine.logits(batch)
        self._require_count(len(given), batch)
        return given

    def _checked(self, targets: SparseTargets, batch: Batch, request: TargetRequest) -> SparseTargets:
        """Ready entries, refused if they are not what was asked for."""
        name, knows, targets = self.engine.name, self.engine.knows, drop_unknown(targets.to("cpu"), self.engine.knows)
        fault = find_fault(targets, request.selection, request.temperatures, self.rows.vocab_size, knows)
        if fault is None:
            return targets
        position, what = fault
        if position is None:
            raise EngineError(f"the engine {name} gave {what}")
        row, slot = batch.slots[position].tolist()
        document, offset = batch.rows[row].locate(slot)
        raise EngineError(
            f"the engine {name} gave {what} in document {document} of the corpus, {offset} tokens into its piece"
        )

    def _require_extras(self, output: EngineOutput, batch: Batch, request: TargetRequest) -> None:
        tokens = sum(batch.token_counts)
        for name in request.extras:
            values = output.extras.get(name)
            if values is None or values.ndim != 2 or len(values) != tokens:
                gave = "nothing" if values is None else f"shape {tuple(values.shape)}"
                raise EngineError(f"the engine {self.engine.name} gave {gave} as extra {name} of {tokens} tokens")

    def _tiles(self, given: HiddenStates | Logits) -> Iterator[Tensor]:
        """Logits `[n, vocab_size]` tile by tile; one empty tile if there is no position."""
        vocab_size = self.rows.vocab_size
        for part in tile_slices(len(given), self.engine.padded_vocab_size or vocab_size, self.device):
            yield self.cut(given.logits(part), part.stop - part.start)  # a variable would keep each tile for too long

    def cut(self, logits: Tensor, wanted: int) -> Tensor:
        """A tile of so many positions without the padding of the vocabulary, its shape checked."""
        if logits.ndim != 2 or len(logits) != wanted or logits.shape[1] < self.rows.vocab_size:
            raise EngineError(
                f"the engine {self.engine.name} gave logits of shape {tuple(logits.shape)} for {wanted} positions and "
                f"a vocabulary of {self.rows.vocab_size} tokens"
            )
        return logits[:, : self.rows.vocab_size]

    def require_finite(self, finite: Tensor, batch: Batch, *, search: bool = True) -> None:
        """Refuse `[N]` labelled slots whose logits are not all finite.

        Args:
            finite: of each slot.
            batch: theirs.
            search: run the pieces again, one by one, to find the token at fault; else the first slot is named.

        Raises:
            LogitsError: with the document and the token.
        """
        try:
            require_finite(finite)
        except LogitsError as error:
            raise self._bad_logits(batch, error.position, search=search) from None

    @torch.inference_mode()
    def _bad_logits(self, batch: Batch, position: int, *, search: bool) -> LogitsError:
        """The error for bad logits, found first at a labelled slot: it names the document and token at fault."""
        row, slot = batch.slots[position].tolist()
        document, offset = (self._find_bad(batch.rows[row:]) if search else None) or batch.rows[row].locate(slot)
        return LogitsError(
            f"the teacher's logits are NaN or infinite in document {document} of the corpus, {offset} tokens "
            "into its piece; try dtype float32 or bfloat16",
            position,
        )

    def _find_bad(self, rows: Sequence[PackedRow]) -> tuple[int, int] | None:
        """The first document and offset whose own tokens give bad logits.

        The logits of a packed row do not show them: a masked neighbour has weight 0, and 0 times NaN is
        NaN. So each piece is run by itself, and the first bad one is bisected by prefixes.
        """

        def bad(tokens: np.ndarray) -> bool:
            row = PackedRow(
                tokens=tokens, piece_lengths=np.array([len(tokens)], np.int32), piece_documents=np.zeros(1, np.int64)
            )
            return not all(bool(torch.isfinite(tile).all()) for tile in self.logits([row], every_slot=True))

        for row in rows:
            ends = np.cumsum(row.piece_lengths)
            for start, end, document in zip(ends - row.piece_lengths, ends, row.piece_documents, strict=True):
                if bad(row.tokens[start:end]):
                    good, length = 0, int(end - start)  # a prefix that is good, and one that is not
                    while length - good > 1:
                        middle = (good + length) // 2
                        good, length = (good, middle) if bad(row.tokens[start : start + middle]) else (middle, length)
                    return int(document), length - 1
        return None


def _finished(batch: Batch, parts: Sequence[_StartedBatch]) -> BatchTargets:
    """The targets of a batch that was given to the engine in parts."""
    found = [part.finish() for part in parts]
    if all(row.prefixes is None for row in batch.rows):
        return found[0]
    return BatchTargets(targets=SparseTargets.cat([part.targets for part in found]), counts=batch.counts)


class _StartedBatch:
    """A batch that the device works on: its targets, gathered there, and on their way to the CPU.

    Targets go into whole tensors at once: small tensors kept between large ones that come and go would leave the heap
    in pieces too small for the next tile. At a vocabulary of 152,064 that took half a gigabyte more, in one run of
    eight.
    """

    _targets: SparseTargets
    _finite: Tensor | None = None
    _copied: Sequence[torch.cuda.Event] = ()

    def __init__(self, teacher: OpenedTeacher, batch: Batch, output: EngineOutput, *, to_cpu: bool) -> None:
        self._teacher, self._batch, self._to_cpu = teacher, batch, to_cpu
        self._extras = {name: values.detach() for name, values in output.extras.items()}
        self.positions = 0

    def take(self, targets: SparseTargets) -> None:
        """Take targets that are ready."""
        self._targets = targets

    def add(self, tile: SparseTargets, finite: Tensor) -> None:
        """Put the next positions' targets, and whether their logits are finite, behind the others."""
        if self._to_cpu:
            tile = tile.to("cpu")  # larger than the logits: a batch of it has no room on a GPU
        start, self.positions = self.positions, self.positions + len(tile.count)
        if start == 0:
            self._targets = tile.spread(slice(0, self.positions), len(self._batch.slots))
            self._finite = finite.new_empty(len(self._batch.slots))
        places = slice(start, self.positions)
        assert self._finite is not None
        self._finite[places] = finite
        for name, whole in vars(self._targets).items():
            if isinstance(whole, Tensor) and start:
                whole[places] = getattr(tile, name).to(whole.device)

    def send(self) -> None:
        """Start the copies to the CPU."""
        assert self._finite is not None
        device = self._finite.device
        if device.type == "cpu":
            return
        devices = {device, *(values.device for values in self._extras.values())}  # a model may lie on several
        self._targets = self._targets.to("cpu", non_blocking=True)
        self._finite = self._finite.to("cpu", non_blocking=True)
        self._extras = {name: values.to("cpu", non_blocking=True) for name, values in self._extras.items()}
        self._copied = [torch.cuda.current_stream(each).record_event() for each in devices if each.type == "cuda"]

    def finish(self) -> BatchTargets:
        """Wait for them, and refuse those of bad logits."""
        for copied in self._copied:
            copied.synchronize()
        if self._finite is not None:
            self._teacher.require_finite(self._finite, self._batch)
        extras = {name: values.cpu() for name, values in self._extras.items()}
        targets = drop_unknown(self._targets, self._teacher.engine.knows)
        return BatchTargets(targets=targets, counts=self._batch.counts, extras=extras)
