"""The forward pass: packed rows in, sparse targets out. Nothing else leaves the device.

Cost above the model's own: the selection, and in memory the logits of one tile of positions (of one batch of
rows with `--no-tile-head`).
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.errors import ConfigError, LogitsError
from kdcache.isolation import probe
from kdcache.positions import Positions
from kdcache.pretrained import find_device, load_model
from kdcache.rows import IGNORE, PackedRow, position_ids
from kdcache.selection import Selection, draws, require_finite, select_ahead, select_device
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.head import TiledHead, logit_tiles, require_same_logits

_AHEAD = {"cuda": 1}
"""Batches given to a device before the one ahead of them is waited for."""


class Targets(NamedTuple):
    """What a teacher says of some rows; positions are their labelled slots, in order.

    Attributes:
        targets: of all N positions; `count` is 0 at those that the cache does not choose.
        labels: positions of each row.
        entropy: `[N]` of the teacher at each of them, chosen or not, nats.
    """

    targets: SparseTargets
    labels: list[int]
    entropy: torch.Tensor


class Teacher:
    """A loaded, probed teacher.

    Attributes:
        batch_rows: rows a forward pass.
        head: the model in two parts; None with `--no-tile-head`.
        compute: what a commit records about how its numbers were made.

    Raises:
        KdcacheError: it cannot be loaded, does not cover its tokenizer, leaks between pieces, or cannot run its
            head in tiles.
    """

    def __init__(self, config: DumpConfig, folder: Path, manifest: Manifest) -> None:
        self.device = find_device(config.device)
        self.batch_rows = config.batch_rows
        self.isolate = config.isolate
        dtype = config.dtype
        if dtype == "auto" and self.device.type == "cpu":
            dtype = "float32"
        self.model = load_model(folder, "teacher", dtype, self.device, config.device_map).eval()
        if config.device_map:
            self.device = self.model.device
        vocab_size = manifest.vocab_size
        rows = self.model.config.get_text_config().vocab_size
        if rows < vocab_size:
            raise ConfigError(f"the teacher predicts {rows} tokens, but its tokenizer has {vocab_size}")
        probe(self.model, vocab_size, config.seq_len, self.device, isolate=self.isolate)
        self.head = TiledHead(self.model, self.device) if config.tile_head else None
        if self.head:
            require_same_logits(self.model, self.head, vocab_size, config.seq_len, self.device)
        self.compute = {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "batch_rows": self.batch_rows,
            "tile_head": config.tile_head,
            "machine": platform.machine(),
            "torch": torch.__version__.partition("+")[0],
        }

    def run(
        self, rows: list[PackedRow], manifest: Manifest, rule: Selection, *,
        shard: int = 0, first_row: int = 0, seed: int = 0,
    ) -> Targets:  # fmt: skip
        """Targets of the labelled slots of some rows.

        Args:
            rows: one batch, all of one shard.
            manifest: of the cache; it says which slots carry a target.
            rule: the selection.
            shard: theirs.
            first_row: the number of the first of them in it.
            seed: decides, with shard, row and slot, what a sampling rule draws.

        Raises:
            LogitsError: NaN or infinite logits, with the document and offset.
        """
        return self._start(rows, manifest, rule, shard, first_row, seed).finish()

    def run_all(
        self, batches: list[list[PackedRow]], manifest: Manifest, rule: Selection, *, shard: int = 0, seed: int = 0
    ) -> Iterator[Targets]:
        """Targets of batch after batch, the rows of a shard from its first on; see `run`.

        A GPU is given a batch before what the one ahead of it gave is looked at and written.
        """
        ahead: deque[_Running] = deque()
        first_row = 0
        for batch in batches:
            ahead.append(self._start(batch, manifest, rule, shard, first_row, seed))
            first_row += len(batch)
            if len(ahead) > _AHEAD.get(self.device.type, 0):
                yield ahead.popleft().finish()
        while ahead:
            yield ahead.popleft().finish()

    @torch.inference_mode()
    def _start(
        self, rows: list[PackedRow], manifest: Manifest, rule: Selection, shard: int, first_row: int, seed: int
    ) -> _Running:
        """Give the device all of a batch's work, and do not wait for it.

        The model may: transformers asks whether rows hold several pieces, once a batch, before the first layer, and so
        waits for the selection of the batch ahead.
        """
        labels = torch.from_numpy(np.stack([row.labels(manifest.seq_len) for row in rows]))  # [R, L]
        wanted = labels != IGNORE
        slots = wanted.nonzero()  # [N, 2]
        keys = torch.cat([torch.full_like(slots[:, :1], shard), slots + torch.tensor([first_row, 0])], -1)  # [N, 3]
        near = select_device(self.device)
        draw, labels = draws(rule, seed, _sent(keys, near)), _sent(labels[wanted], near)
        running = _Running(self, rows, slots, wanted.sum(-1).tolist(), manifest.choice)
        for logits in self._logits(rows, manifest, slots):  # [n, V]
            tile = slice(running.positions, running.positions + len(logits))
            logits = logits.to(select_device(logits.device))
            part = None if draw is None else draw[tile].to(logits.device)
            running.add(*select_ahead(logits, rule, labels[tile].to(logits.device), manifest.temperatures, part))
            del logits  # before the next tile is made
        running.send()
        return running

    @torch.inference_mode()
    def logits(self, rows: list[PackedRow], manifest: Manifest) -> Iterator[torch.Tensor]:
        """Logits of all labelled slots of some rows, in order, in tiles `[n, V]`."""
        labels = torch.from_numpy(np.stack([row.labels(manifest.seq_len) for row in rows]))
        yield from self._logits(rows, manifest, (labels != IGNORE).nonzero())

    def _logits(self, rows: list[PackedRow], manifest: Manifest, slots: torch.Tensor) -> Iterator[torch.Tensor]:
        length = manifest.seq_len
        tokens = _sent(torch.from_numpy(np.stack([row.padded_tokens(length) for row in rows])), self.device)
        segments = np.stack([row.segments(length) for row in rows])
        positions = torch.from_numpy(position_ids(segments if self.isolate else np.zeros_like(segments)))
        positions, slots = _sent(positions, self.device), _sent(slots, self.device)
        tiles = logit_tiles(self.model, self.head, tokens, positions, slots)
        yield from map(lambda tile: tile[:, : manifest.vocab_size], tiles)  # noqa: C417 - a variable would keep each tile

    @torch.inference_mode()
    def named(self, rows: list[PackedRow], slots: torch.Tensor, position: int) -> LogitsError:
        """The error for bad logits seen first at `slots[position]`: it names the document and token at fault."""
        row, slot = slots[position].tolist()
        document, offset = self._blame(rows[row:]) or rows[row].locate(slot)
        return LogitsError(
            f"the teacher's logits are NaN or infinite in document {document} of the corpus, {offset} tokens "
            "into its piece; try --dtype float32 or --dtype bfloat16",
            position,
        )

    def _blame(self, rows: list[PackedRow]) -> tuple[int, int] | None:
        """The first document and offset whose own tokens give bad logits.

        In a packed row they cannot be told from the logits: a masked neighbour has weight 0, and 0
        times NaN is NaN. So each piece runs alone, and the first bad one is bisected by prefixes.
        """

        def bad(tokens: np.ndarray) -> bool:
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self.device)
            places = torch.arange(ids.shape[1], device=self.device)[None]
            tiles = logit_tiles(self.model, self.head, ids, places, torch.ones_like(ids).nonzero())
            return not all(bool(torch.isfinite(logits).all()) for logits in tiles)

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


class _Running:
    """A batch that the device works on: its targets, laid side by side there, and on their way to the CPU.

    Small tensors kept between large ones that come and go would leave the heap in pieces too small for the next
    tile: joined only at the end, at a vocabulary of 152,064, they cost half a gigabyte more, one run in eight.
    """

    _targets: SparseTargets
    _arrival: torch.cuda.Event | None = None

    def __init__(
        self, teacher: Teacher, rows: list[PackedRow], slots: torch.Tensor, labels: list[int], choice: Positions
    ) -> None:
        self._teacher, self._rows, self._slots, self._labels, self._choice = teacher, rows, slots, labels, choice
        self.positions = 0

    def add(self, tile: SparseTargets, finite: torch.Tensor) -> None:
        """Lay the next positions' targets, and whether their logits are finite, beside the others."""
        if tile.kind == "full":
            tile = tile.to("cpu")  # larger than the logits: a batch of it has no room on a GPU
        start, self.positions = self.positions, self.positions + len(tile.count)
        if start == 0:
            self._targets = tile.spread(slice(0, self.positions), len(self._slots))
            self._finite = finite.new_empty(len(self._slots))
        places = slice(start, self.positions)
        self._finite[places] = finite
        for name, whole in vars(self._targets).items():
            if isinstance(whole, torch.Tensor) and start:
                whole[places] = getattr(tile, name).to(whole.device)

    def send(self) -> None:
        """Start the copies to the CPU."""
        device = self._finite.device
        if device.type == "cpu":
            return
        self._targets = self._targets.to("cpu", non_blocking=True)
        self._finite = self._finite.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.current_stream(device).record_event()

    def finish(self) -> Targets:
        """Wait for them, look at them, and leave out the positions that the cache does not choose."""
        if self._arrival:
            self._arrival.synchronize()
        try:
            require_finite(self._finite)
        except LogitsError as error:
            raise self._teacher.named(self._rows, self._slots, error.position) from None
        targets, entropy = self._targets, self._targets.entropy
        chosen = self._choice.chosen(entropy)
        if chosen is not None:
            targets = targets[chosen].spread(chosen.nonzero()[:, 0], len(entropy))
        return Targets(targets, self._labels, entropy)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on its way to the device, which nobody waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
