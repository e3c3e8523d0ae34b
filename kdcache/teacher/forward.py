"""The forward pass: packed rows in, sparse targets out. Nothing else leaves the device.

Cost above the model's own: the selection, and in memory the logits of one tile of positions (of one batch of
rows with `--no-tile-head`).
"""

from __future__ import annotations

import platform
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
from kdcache.selection import Selection, select
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.head import TiledHead, logit_tiles, require_same_logits


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

    @torch.inference_mode()
    def run(
        self,
        rows: list[PackedRow],
        manifest: Manifest,
        rule: Selection,
        *,
        shard: int = 0,
        first_row: int = 0,
        seed: int = 0,
    ) -> Targets:
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
        labels = torch.from_numpy(np.stack([row.labels(manifest.seq_len) for row in rows]))  # [R, L]
        wanted = labels != IGNORE
        slots = wanted.nonzero()  # [N, 2]
        keys = torch.cat([torch.full_like(slots[:, :1], shard), slots + torch.tensor([first_row, 0])], -1)  # [N, 3]
        labels, found = labels[wanted].to(self.device), _Joined(len(slots), manifest.choice)
        for logits in self._logits(rows, manifest, slots):  # [n, V]
            tile = slice(found.done, found.done + len(logits))
            try:
                targets = select(
                    logits, rule,
                    labels=labels[tile].to(logits.device), temperatures=manifest.temperatures,
                    seed=seed, keys=keys[tile],
                )  # fmt: skip
            except LogitsError as error:
                raise self._named(rows, slots, tile.start + error.position) from None
            found.add(targets)
            del logits, targets  # before the next tile is made
        return Targets(found.targets, wanted.sum(-1).tolist(), found.entropy)

    @torch.inference_mode()
    def logits(self, rows: list[PackedRow], manifest: Manifest) -> Iterator[torch.Tensor]:
        """Logits of all labelled slots of some rows, in order, in tiles `[n, V]`."""
        labels = torch.from_numpy(np.stack([row.labels(manifest.seq_len) for row in rows]))
        yield from self._logits(rows, manifest, (labels != IGNORE).nonzero())

    def _logits(self, rows: list[PackedRow], manifest: Manifest, slots: torch.Tensor) -> Iterator[torch.Tensor]:
        length = manifest.seq_len
        tokens = torch.from_numpy(np.stack([row.padded_tokens(length) for row in rows])).to(self.device)
        segments = np.stack([row.segments(length) for row in rows])
        positions = torch.from_numpy(position_ids(segments if self.isolate else np.zeros_like(segments)))
        for logits in logit_tiles(self.model, self.head, tokens, positions.to(self.device), slots):
            yield logits[:, : manifest.vocab_size]

    def _named(self, rows: list[PackedRow], slots: torch.Tensor, position: int) -> LogitsError:
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


class _Joined:
    """Targets of tiles, copied to where they belong as they come.

    Small tensors kept between large ones that come and go would leave the heap in pieces too small for the next
    tile: joined only at the end, at a vocabulary of 152,064, they cost half a gigabyte more, one run in eight.
    """

    targets: SparseTargets

    def __init__(self, positions: int, choice: Positions) -> None:
        self._positions, self._choice, self.done = positions, choice, 0
        self.entropy = torch.empty(positions)

    def add(self, tile: SparseTargets) -> None:
        start, self.done = self.done, self.done + len(tile.count)
        self.entropy[start : self.done] = tile.entropy
        slots: torch.Tensor | slice = slice(start, self.done)
        chosen = self._choice.chosen(tile.entropy)
        if chosen is not None:  # the others stay on the device
            tile, slots = tile[chosen], torch.arange(start, self.done)[chosen.cpu()]
        if start == 0:
            self.targets = tile.to("cpu").spread(slots, self._positions)
        else:
            for name, whole in vars(self.targets).items():
                if isinstance(whole, torch.Tensor):
                    whole[slots] = getattr(tile, name).to("cpu")
