"""The forward pass: packed rows in, sparse targets out. Nothing else leaves the device.

Cost above the model's own: the logits of one batch of rows in memory, and the selection.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

from kdcache.errors import ConfigError, LogitsError
from kdcache.isolation import packed_forward, probe
from kdcache.pretrained import find_device, load_model
from kdcache.rows import IGNORE, PackedRow, position_ids
from kdcache.selection import Selection, select
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.teacher.config import DumpConfig


class Teacher:
    """A loaded, probed teacher.

    Attributes:
        batch_rows: rows a forward pass.
        compute: what a commit records about how its numbers were made.

    Raises:
        KdcacheError: it cannot be loaded, does not cover its tokenizer, or leaks between pieces.
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
        self.compute = {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "batch_rows": self.batch_rows,
            "machine": platform.machine(),
            "torch": torch.__version__.partition("+")[0],
        }

    @torch.inference_mode()
    def run(self, rows: list[PackedRow], manifest: Manifest, rule: Selection) -> tuple[SparseTargets, list[int]]:
        """Targets of all labelled slots of some rows, in order, and how many each row has."""
        length = manifest.seq_len
        tokens = torch.from_numpy(np.stack([row.padded_tokens(length) for row in rows])).to(self.device)
        labels = torch.from_numpy(np.stack([row.labels(length) for row in rows])).to(self.device)
        segments = np.stack([row.segments(length) for row in rows])
        positions = torch.from_numpy(position_ids(segments if self.isolate else np.zeros_like(segments)))
        logits = packed_forward(self.model, tokens, positions.to(self.device)).logits  # [R, L, >= V]
        wanted = (labels != IGNORE).to(logits.device)
        try:
            targets = select(
                logits[wanted][:, : manifest.vocab_size], rule,
                labels=labels.to(logits.device)[wanted], temperatures=manifest.temperatures,
            )  # fmt: skip
        except LogitsError as error:
            row, slot = (int(x) for x in wanted.nonzero()[error.position])
            document, offset = self._blame(rows[row:]) or rows[row].locate(slot)
            raise LogitsError(
                f"the teacher's logits are NaN or infinite in document {document} of the corpus, {offset} tokens "
                "into its piece; try --dtype float32 or --dtype bfloat16",
                error.position,
            ) from None
        return targets.to("cpu"), wanted.sum(-1).tolist()

    def _blame(self, rows: list[PackedRow]) -> tuple[int, int] | None:
        """The first document and offset whose own tokens give bad logits.

        In a packed row they cannot be told from the logits: a masked neighbour has weight 0, and 0
        times NaN is NaN. So each piece runs alone, and the first bad one is bisected by prefixes.
        """

        def bad(tokens: np.ndarray) -> bool:
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self.device)
            places = torch.arange(ids.shape[1], device=self.device)[None]
            return not bool(torch.isfinite(packed_forward(self.model, ids, places).logits).all())

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
