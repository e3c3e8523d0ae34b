"""The forward pass: packed rows in, sparse targets out. Nothing else leaves the device.

Cost above the model's own: the selection, and in memory the logits of one tile of positions (of one batch of
rows with `--no-tile-head`).

The output head in tiles: logits of the slots that are wanted, a few at a time.

Guarantee: every logit comes out of the model's own forward code, so all that a model does between its hidden states
and its logits (a bias, soft-capping, scaling, a cast) is done; and `[R, L, V]` never exists. The body runs once;
then the model's forward runs again for each tile with its body replaced, for that call, by a stub that returns
the tile's hidden states. No class is changed and nothing stays behind. `require_same_logits` compares the two ways.
Cost: the head over the wanted slots only; in memory `[R, L, D]` and the logits of one tile.

Shapes: R rows, L slots, D hidden, V vocabulary of the model (padding included), N slots wanted, n slots of a tile.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, LogitsError, ModelError
from kdcache.isolation import finite_tokens, packed_forward, probe, rounding
from kdcache.position_filter import Positions
from kdcache.pretrained import find_device, load_model, one_line
from kdcache.rows import IGNORE, PackedRow, position_ids
from kdcache.selection import Selection, draws, require_finite, select_ahead, select_device
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.teacher.config import DumpConfig

TILE_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a tile, by device; others do as a GPU does. On a CPU 16 MiB, which malloc hands out again; above 32 MiB
it takes fresh pages each time, which costs more than all the calls of small tiles (docs/decisions/0006)."""

GPU_TILES = 6
"""Tiles of a batch at most, on a GPU: a selection is a hundred small operations or more, however few its positions."""

_MOST_LOGITS = 1 << 28
"""Logits of a tile at most, however large the batch is."""

_LEAST_POSITIONS = 128
"""Positions of a tile at least, however large the vocabulary: each tile reads all of the head's weights."""

_CHECKED_TOKENS = 48
_REMEDY = "use --no-tile-head, which holds the logits of a whole batch in memory"


class TiledHead:
    """A causal language model in two parts: the body, and all that comes after it.

    Args:
        model: a transformers causal language model.
        device: where its inputs go.

    Raises:
        ModelError: no part of the model returns hidden states.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self._model = model
        self._body, self._output = _find_body(model, device)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[R, L, D]` what the head is given, by one forward pass whose head sees a single slot."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> Any:  # noqa: ARG001 - torch's signature
            kept.append(output.last_hidden_state)
            return self._output(last_hidden_state=kept[-1][:1, :1])

        handle = self._body.register_forward_hook(keep)
        try:
            packed_forward(self._model, tokens, positions)
        finally:
            handle.remove()
        return kept[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, V]` the model's logits for `[n, D]` hidden states of any slots."""
        unused = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _instead_of(self._body, lambda *_, **__: self._output(last_hidden_state=hidden[None])):
            logits: Tensor = packed_forward(self._model, unused, unused).logits[0]
        return logits


def logit_tiles(
    model: nn.Module, head: TiledHead | None, tokens: Tensor, positions: Tensor, slots: Tensor
) -> Iterator[Tensor]:
    """Logits of some slots, in their order, tile by tile.

    Args:
        model: the model.
        head: the same model in two parts; None to take tiles of the logits of its own forward pass.
        tokens: `[R, L]` token ids.
        positions: `[R, L]` position of each token inside its piece.
        slots: `[N, 2]` row and slot of each position wanted.

    Yields:
        `[n, V]`; the tiles hold N positions together. One empty tile if N is 0.
    """
    index = (slots[:, 0] * tokens.shape[1] + slots[:, 1]).to(tokens.device)  # before the body: nothing waits for it
    source = packed_forward(model, tokens, positions).logits if head is None else head.hidden(tokens, positions)
    source, index = source.flatten(0, 1), index.to(source.device)  # [R * L, V or D]
    for part in index.tensor_split(_tiles(model, len(index), source.device)):
        yield source[part] if head is None else head.logits(source[part])


def _tiles(model: Any, positions: int, device: torch.device) -> int:
    """How many tiles of about equal size; a last one of a few positions would cost as much as a full one."""
    vocab_size: int = model.config.get_text_config().vocab_size
    size = TILE_LOGITS.get(device.type, TILE_LOGITS["cuda"])
    if device.type != "cpu":
        size = max(size, min(_MOST_LOGITS, -(-positions // GPU_TILES) * vocab_size))
    return max(1, -(-positions // max(_LEAST_POSITIONS, size // vocab_size)))


@torch.inference_mode()
def require_same_logits(model: nn.Module, head: TiledHead, vocab_size: int, seq_len: int, device: Any) -> None:
    """Refuse a model whose logits over tiles are not those of its own forward pass.

    A row of tokens is run whole, and its slots shuffled in two tiles. They may differ by as much as the logits of
    a prefix differ when it runs alone (a sum over D is then cut otherwise, too), and by some roundings.
    Cost: three forward passes over at most 48 tokens, one over 64 single tokens, and the head twice.

    Raises:
        ModelError: they differ by more, or the model cannot be run in tiles at all.
    """
    tokens = finite_tokens(model, vocab_size, device)[None, : min(seq_len, _CHECKED_TOKENS)].to(device)
    length = tokens.shape[1]
    if length < 2:  # nothing to divide: the first position of real text will be refused, and named
        return
    positions, cut = torch.arange(length, device=device)[None], length // 3 or 1
    own = packed_forward(model, tokens, positions).logits[0].float()
    prefix = packed_forward(model, tokens[:, :cut], positions[:, :cut]).logits[0].float()
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).to(own.device)
    name = type(model).__name__
    try:
        hidden = head.hidden(tokens, positions)[0]
        tiled = torch.cat([head.logits(hidden[part.to(hidden.device)]) for part in (order[:cut], order[cut:])])
        moved = (tiled.to(own.device).float() - own[order]).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} cannot run its output head over tiles of positions ({one_line(error)}); {_REMEDY}"
        ) from error
    allowed = 4 * (prefix - own[:cut]).abs().max().item() + 4 * rounding(model) * own.abs().max().item()
    if not moved <= allowed:
        raise ModelError(
            f"the logits of {name} over tiles of positions differ from those of its own forward pass by {moved:.2g} "
            f"(noise allows {allowed:.2g}); {_REMEDY}"
        )


@torch.inference_mode()
def _find_body(model: nn.Module, device: torch.device | str) -> tuple[nn.Module, type]:
    """The outermost part that returns hidden states, which is the last to return them; and the type of its output."""
    found: list[tuple[nn.Module, type]] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            found.append((module, type(output)))

    handles = [part.register_forward_hook(look) for part in model.modules() if part is not model]
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        packed_forward(model, token, token)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ModelError(
            f"{type(model).__name__} cannot run its output head over tiles of positions, as no part of it returns "
            f"hidden states; {_REMEDY}"
        )
    return found[-1]


@contextmanager
def _instead_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let an instance's forward be another one; hooks of accelerate, which live in the same place, are put back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


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
        running = _Running(self, rows, slots, wanted.sum(-1).tolist(), manifest.choice, rule.form.every_id)
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
        self, teacher: Teacher, rows: list[PackedRow], slots: torch.Tensor, labels: list[int], choice: Positions,
        every_id: bool,
    ) -> None:  # fmt: skip
        self._teacher, self._rows, self._slots, self._labels, self._choice = teacher, rows, slots, labels, choice
        self._every_id = every_id
        self.positions = 0

    def add(self, tile: SparseTargets, finite: torch.Tensor) -> None:
        """Lay the next positions' targets, and whether their logits are finite, beside the others."""
        if self._every_id:
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
        targets, entropy = self._targets, self._targets.require("entropy", "a dump")
        chosen = self._choice.chosen(entropy)
        if chosen is not None:
            targets = targets[chosen].spread(chosen.nonzero()[:, 0], len(entropy))
        return Targets(targets, self._labels, entropy)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on its way to the device, which nobody waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
