"""The engine `vllm`: vLLM runs the teacher in a process of its own, in an environment of its own.

The selection runs inside that process, on the device, over the whole vocabulary at every temperature; only entries and
scalars come back. Each piece is a request of its own, so pieces cannot see each other. Hidden states, and logits for
whoever asks for them, come the same way.

Before it is used, targets of a few rows are compared with those of transformers, or where that model does not fit into
memory with the engine's own for the same tokens as shorter requests (`start_check.py`).
Cost: a start of vLLM (on a CPU about 10 s), that comparison, and the entries twice through a pipe.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import ConfigError, EngineError
from kdcache.pretrained import hidden_width
from kdcache.pretrained.files import is_gguf
from kdcache.rows import RowSpec
from kdcache.teacher.engines.base import (
    HIDDEN,
    Engine,
    EngineOutput,
    HiddenStates,
    TargetRequest,
    TeacherSpec,
    require_defaults,
)
from kdcache.teacher.engines.batch import Batch, Piece
from kdcache.teacher.engines.frames import Arrays
from kdcache.teacher.engines.start_check import require_faithful
from kdcache.teacher.engines.target_rows import MOST_IDS, columns, unpack_targets
from kdcache.teacher.engines.vllm_worker.settings import SETTINGS, VARIABLE
from kdcache.teacher.engines.worker_process import WorkerProcess

_SITE = Path(__file__).parent / "vllm_worker" / "site"

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""Environment variables of torchrun, which vLLM would take for its own."""


class VllmEngine(Engine):
    """A teacher that vLLM runs.

    Raises:
        KdcacheError: there is no vLLM, or not one that was tested; it cannot run the teacher, or gives other numbers.
    """

    name = "vllm"
    settings: ClassVar = SETTINGS
    own_python: ClassVar = True

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        settings = self.settings_of(spec)
        _require_own_options(spec, folder)
        if rows.vocab_size > MOST_IDS:
            raise ConfigError(f"the vocabulary has {rows.vocab_size} tokens, above the {MOST_IDS} of the engine vllm")
        architecture = _architecture(folder)
        device, index = _device(spec)
        environment = _environment(settings, index, spec.tensor_parallel)
        environment[VARIABLE] = json.dumps({"architecture": architecture, "vocab_size": rows.vocab_size})
        self._rows = rows
        self._worker = WorkerProcess(
            self.name, [_python(spec), "-m", "kdcache_vllm"], environment, float(settings["timeout"])
        )
        try:
            opened, _ = self._worker.ask(
                {
                    "do": "open", "model": str(folder), "architecture": architecture, "device": device,
                    "vocab_size": rows.vocab_size, "seq_len": rows.seq_len, "dtype": spec.dtype,
                    "tensor_parallel": spec.tensor_parallel, "settings": settings,
                }
            )  # fmt: skip
            self._described: dict[str, Any] = dict(opened["described"])
            self._hidden_size = int(opened["hidden_size"])
            require_faithful(self, folder, rows, str(self._described["dtype"]), self._described["chunk_tokens"])
        except BaseException:
            self._worker.close()
            raise

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        """The targets of the labelled slots, and the hidden states of all tokens where they are asked for."""
        selection, temperatures, vocab_size = request.selection, request.temperatures, self._rows.vocab_size
        rule = {"selection": selection.to_fields(), "temperatures": list(temperatures), "seed": request.seed}
        pieces, hidden = list(batch.pieces(every=bool(request.extras))), bool(request.extras)
        found = self._run(batch, pieces, rule, hidden=hidden)
        width = sum(columns(selection, temperatures, vocab_size, labelled=True).values()) + 1
        rows = self._array(found, "targets", (len(batch.slots), width))
        targets, finite = unpack_targets(rows, selection, temperatures, vocab_size)
        states = self._array(found, "hidden", (sum(batch.token_counts), self._hidden_size)) if hidden else None
        extras = {} if states is None else dict.fromkeys(request.extras, states)
        return EngineOutput(positions=targets, finite=finite, extras=extras)

    def logits(self, batch: Batch) -> HiddenStates:
        """The hidden states of the labelled slots, with the head that vLLM holds."""
        pieces = list(batch.pieces())
        found = self._run(batch, pieces, None, hidden=True)
        ends = np.cumsum([len(piece.tokens) for piece in pieces], dtype=np.int64).tolist()
        states = self._array(found, "hidden", (ends[-1] if ends else 0, self._hidden_size))
        slots = [piece.slots + end - len(piece.tokens) for piece, end in zip(pieces, ends, strict=True)]
        return HiddenStates(states[torch.cat(slots) if slots else slice(0)], self._head)

    @classmethod
    def extra_widths(cls, folder: Path) -> dict[str, int]:
        """`hidden:-1`, the hidden state that the head is given."""
        width = hidden_width(folder)
        return {} if width is None else {HIDDEN: width}

    def describe(self) -> dict[str, Any]:
        """Versions, dtype, device, and how vLLM divides its work."""
        return self._described

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _run(self, batch: Batch, pieces: list[Piece], rule: dict[str, Any] | None, *, hidden: bool) -> Arrays:
        if not pieces:
            return {"targets": np.zeros((0, 0), np.float32), "hidden": np.zeros((0, 0), np.float32)}
        slots = [piece.slots.numpy() for piece in pieces]
        arrays = {
            "tokens": np.concatenate([piece.tokens.numpy() for piece in pieces]).astype(np.int32),
            "lengths": np.array([len(piece.tokens) for piece in pieces]),
            "slots": np.concatenate(slots),
            "slot_counts": np.array([len(each) for each in slots]),
            "labels": batch.labels.numpy(),
            "keys": batch.keys.numpy(),
        }
        return self._worker.ask({"do": "run", "rule": rule, "hidden": hidden}, arrays)[1]

    def _head(self, states: Tensor) -> Tensor:
        """`[n, V]` logits of hidden states `[n, D]`."""
        found = self._worker.ask({"do": "head"}, {"states": states.numpy()})[1]
        return self._array(found, "logits", (len(states), self._rows.vocab_size))

    def _array(self, found: Arrays, name: str, shape: tuple[int, int]) -> Tensor:
        """An array of an answer, refused if it is not float32 of this shape."""
        array = found.get(name)
        if array is None or array.dtype != np.float32 or (array.shape != shape and (array.size or shape[0])):
            gave = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise EngineError(
                f"the process of the engine {self.name} gave {gave} as {name}, where float32 {list(shape)} was asked"
            )
        return torch.from_numpy(array).reshape(shape)


def _require_own_options(spec: TeacherSpec, folder: Path) -> None:
    """Refuse options that are transformers' own.

    Raises:
        ConfigError: naming one.
    """
    if is_gguf(folder):
        raise ConfigError(f"{folder} is a .gguf file, which the engine vllm does not run; use engine transformers")
    require_defaults(
        VllmEngine.name, spec,
        device_map="tensor_parallel spreads a teacher over several GPUs",
        attn_implementation="vLLM chooses its attention",
        tile_head="vLLM's head always runs in tiles",
    )  # fmt: skip


def _architecture(folder: Path) -> str:
    """The name of the model's class in its configuration.

    Raises:
        ConfigError: it has none.
    """
    names = json.loads((folder / "config.json").read_bytes()).get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ConfigError(f"{folder / 'config.json'} does not name one architecture, which the engine vllm needs")
    return names[0]


def _python(spec: TeacherSpec) -> str:
    """The Python of vLLM's environment.

    Raises:
        ConfigError: it is not there, or none is named and this one has no vLLM.
    """
    if spec.engine_python is not None:
        path = Path(spec.engine_python).expanduser()
        if not path.is_file():
            raise ConfigError(f"engine_python {spec.engine_python} does not exist")
        return str(path.absolute())
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed here; name the Python of the environment that has it by engine_python "
            "(docs/engines.md says how such an environment is made)"
        )
    return sys.executable


def _device(spec: TeacherSpec) -> tuple[str, int | None]:
    """The kind of device, `auto` for what vLLM was built for, and the number of the first GPU where one is meant.

    Raises:
        ConfigError: a device that vLLM does not have.
    """
    kind, _, number = spec.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"device {spec.device} is not one of the engine vllm: auto, cpu, cuda or cuda:1")
    if number:
        return kind, int(number)
    local_rank = os.environ.get("LOCAL_RANK", "")
    return kind, int(local_rank) * spec.tensor_parallel if local_rank.isdecimal() and kind != "cpu" else None


def _environment(settings: dict[str, Any], first_gpu: int | None, gpus: int) -> dict[str, str]:
    """What the process is started with."""
    found = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_SITE), found.get("PYTHONPATH"))))
    found.update(
        HF_HUB_OFFLINE="1",  # the teacher is a folder
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # else what shares a batch depends on timing
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
    )
    found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound threads of several workers would share a core
    found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // gpus)))
    if found.get("VLLM_PLUGINS") is not None:
        found["VLLM_PLUGINS"] += ",kdcache"
    if settings["batch_invariant"]:
        found["VLLM_BATCH_INVARIANT"] = "1"
    if first_gpu is not None:
        visible = [name for name in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        wanted = range(first_gpu, first_gpu + gpus)
        if not visible:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, wanted))
        elif first_gpu + gpus <= len(visible):
            found["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] for i in wanted)
    return found
