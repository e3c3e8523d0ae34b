"""The engine `server`: a teacher that is already served, asked over HTTP.

It knows the k most likely tokens and the label at T = 1, and nothing else; a request that needs more is refused before
anything runs. Each piece is a prompt of its own. Several are asked for at the same time, and what shares a batch on the
server depends on timing, so numbers are near-identical from run to run, not bit for bit.

Before the first batch a prompt is asked for, and the server refused if it answers with another model, another
tokenizer, rounded numbers, or fewer entries.
Cost: about 70 bytes of JSON for each entry.
"""

from __future__ import annotations

import hashlib
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from kdcache.errors import ConfigError, EngineError, ModelError, TargetError
from kdcache.pretrained import load_tokenizer
from kdcache.pretrained.files import tokenizer_folder
from kdcache.pretrained.tokenizer import SAMPLE
from kdcache.rows import RowSpec
from kdcache.store.sealed_json import canonical
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import (
    Engine,
    EngineKnowledge,
    EngineOutput,
    HiddenStates,
    Logits,
    TargetRequest,
    TeacherFiles,
    TeacherSpec,
    require_defaults,
)
from kdcache.teacher.engines.batch import Batch, Piece
from kdcache.teacher.engines.completions import Completions, require_exact

_CHECKED_TOKENS = 64


class ServerEngine(Engine):
    """A teacher behind an OpenAI-compatible server with vLLM's `prompt_logprobs`.

    Raises:
        KdcacheError: there is no such server or model, or its tokenizer is another.
    """

    name = "server"
    knows = EngineKnowledge(whole_vocabulary=False, temperatures=(1.0,), entropy=False, label_logprob=True)
    settings: ClassVar = {"model": "", "concurrency": 16, "timeout": 600.0, "retries": 8}

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        settings = self.settings_of(spec)
        self._rows, self._settings = rows, settings
        self._server = _server(spec, settings)
        try:
            self._compared = _require_tokenizer(self._server, folder)
        except BaseException:
            self._server.close()
            raise
        self._threads = ThreadPoolExecutor(settings["concurrency"], "kdcache-server")

    @classmethod
    def teacher_files(cls, spec: TeacherSpec) -> TeacherFiles:
        """The tokenizer that is named, or else that of what the server says it has loaded."""
        require_defaults(
            cls.name, spec,
            device="the server has its own", device_map="the server has its own", dtype="the server has its own",
            attn_implementation="the server has its own", tensor_parallel="the server has its own",
            engine_python="nothing is started", tile_head="the server runs its head",
        )  # fmt: skip
        server = _server(spec, cls.settings_of(spec))
        server.close()
        source = spec.tokenizer or server.root or server.model
        try:
            folder = tokenizer_folder(source)
        except ModelError as error:
            if spec.tokenizer is not None:
                raise
            raise ConfigError(
                f"the server {server.address} says that its model is {source}, of which no tokenizer is found here "
                f'({error}); name its folder or hub name: tokenizer="NAME"'
            ) from None
        identity = canonical({"served_model": server.model, "root": server.root})
        return TeacherFiles(
            folder=folder, context=server.context, sha256=lambda: hashlib.sha256(b"server" + identity).hexdigest()
        )

    def prepare(self, request: TargetRequest) -> None:
        """Ask for the log-probabilities of a few random tokens, and check them."""
        k = request.selection.width(self._rows.vocab_size)
        length = min(_CHECKED_TOKENS, self._rows.seq_len)
        tokens = np.random.default_rng(0).integers(0, self._rows.vocab_size, length).tolist()
        ids, logprobs, _ = self._server.top(tokens, k)
        if ids.max() >= self._rows.vocab_size:
            raise ModelError(
                f"the server {self._server.address} gives id {ids.max()}, but the tokenizer has "
                f"{self._rows.vocab_size} tokens; a model whose padded ids have a probability cannot be served so"
            )
        require_exact(logprobs, self._server.address)

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        """The k most likely tokens of the labelled slots; every piece is a prompt."""
        k = request.selection.width(self._rows.vocab_size)
        found = list(self._threads.map(lambda piece: self._top(piece, k), batch.pieces()))
        if not found:
            found = [(np.zeros((0, k), np.int64), np.zeros((0, k)), np.zeros(0))]
        ids, logprobs, label = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
        try:
            return EngineOutput(positions=SparseTargets.from_topk(ids, logprobs, label_logprob=label))
        except TargetError as error:
            raise EngineError(f"the server {self._server.address} gave numbers that are none: {error}") from None

    def logits(self, batch: Batch) -> HiddenStates | Logits:  # noqa: ARG002 - it has none
        """Refused.

        Raises:
            EngineError: always.
        """
        raise EngineError(f"the engine {self.name} gives entries, and no logits of the whole vocabulary")

    def describe(self) -> dict[str, Any]:
        """The model on the server, and whether its tokenizer could be compared."""
        return {
            "machine": platform.machine(),
            "served_model": self._server.model,
            "served_root": self._server.root,
            "tokenizer_compared": self._compared,
            "concurrency": self._settings["concurrency"],
        }

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._server.close()

    def _top(self, piece: Piece, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._server.top(piece.tokens.tolist(), k)
        ids, logprobs, label = (values[piece.slots.numpy()] for values in found)
        return ids, logprobs, label


def _server(spec: TeacherSpec, settings: dict[str, Any]) -> Completions:
    for name in ("concurrency", "timeout"):
        if not settings[name] > 0:
            raise ConfigError(f"engine_set {name} is {settings[name]:g}, but must be above 0")
    if settings["retries"] < 0:
        raise ConfigError(f"engine_set retries is {settings['retries']}, but must not be negative")
    return Completions(
        spec.model, settings["model"], concurrency=settings["concurrency"], timeout=settings["timeout"],
        retries=settings["retries"],
    )  # fmt: skip


def _require_tokenizer(server: Completions, folder: Path) -> bool:
    """Whether the server could be asked for the tokens of a text.

    Raises:
        ModelError: they are others than those of the tokenizer here.
    """
    theirs = server.tokenize(SAMPLE)
    if theirs is None:
        return False
    ours = list(load_tokenizer(folder).encode(SAMPLE, add_special_tokens=False))
    if theirs != ours:
        at = next((i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), None)
        where = f"token {at} is {theirs[at]}, not {ours[at]}" if at is not None else f"{len(theirs)}, not {len(ours)}"
        raise ModelError(
            f"the server {server.address} has another tokenizer than {folder}: of a text of digits, accents, CJK and "
            f"code {where}; name that of the served model: "
            'tokenizer="NAME"'
        )
    return True
