"""A causal language model, loaded whole: every weight of its files, and no other, in one dtype.

Of a multimodal checkpoint the text is run: rows hold tokens only, so its logits are those of the whole model for text.
Cost: what transformers takes to load it, and the headers of the weight files once more.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError, ModelError, one_line
from kdcache.lazy_torch import torch
from kdcache.pretrained import gguf_file, weights
from kdcache.pretrained.config import load_config, place
from kdcache.pretrained.files import is_gguf, weight_files
from kdcache.pretrained.quantised import loading_options, quantisation


def find_device(name: str) -> torch.device:
    """The device of a name like `cpu` or `cuda:1`; `auto` takes this rank's GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            return torch.device("cuda", local_rank % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ConfigError(f"device {name} is not a cpu, cuda or mps device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_model(
    path: Path,
    role: str,
    dtype: str,
    device: torch.device | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    tensor_parallel: int = 1,
) -> Any:
    """Load a causal language model, or the text part of a multimodal one.

    Args:
        path: its folder, or its .gguf file.
        role: `teacher` or `student`, for messages.
        dtype: `auto` for that of the checkpoint, or the name of one; all parameters get it, but those that keep packed
            weights, and those that the architecture keeps in float32.
        device: where it goes; None for the CPU.
        device_map: as transformers takes it, instead of `device`.
        attn_implementation: as transformers takes it; None for its choice.
        tensor_parallel: processes of this one's group, each of which loads its part of every layer.

    Raises:
        ModelError: transformers cannot make a model of the files, would have to invent weights, or leaves some out; or
            it cannot run what it made.
    """
    config = load_config(path)
    options = loading_options(path, role, device)
    stored = {} if is_gguf(path) else weights.read_headers(weight_files(path, role))
    weights.require_scales(stored, path, role)
    if attn_implementation is not None:
        if "/" in attn_implementation:
            raise ConfigError(f"attn_implementation {attn_implementation} names code of the hub, which is never run")
        options["attn_implementation"] = attn_implementation
    if tensor_parallel > 1:
        if quantisation(path) is not None:
            raise ModelError(
                f"the {role} {path} is quantised by {quantisation(path)}, which cannot be cut for tensor_parallel "
                f"{tensor_parallel}: use device_map auto"
            )
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    packed = "quantization_config" not in options and quantisation(path) is not None
    where, more = place(path)
    if is_gguf(path):
        options["config"] = config  # else the file is read once more
    if packed and device is not None and device_map is None:  # packed weights are made where they stay
        options["device_map"] = {"": device}
    else:
        options["device_map"] = device_map
    with weights.watch_loading() as seen, _quiet():
        try:
            model, info = _auto_class(config).from_pretrained(
                where, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **more, **options,
            )  # fmt: skip
        except Exception as error:
            name, why = next(iter(sorted(seen.broken.items())), (None, error))
            what = f"{name} cannot be converted: {why}" if name else one_line(error)
            wanted = f" with attn_implementation {attn_implementation}" if attn_implementation else ""
            raise ModelError(f"the {role} {path} cannot be loaded{wanted}: {what}") from error
    _require_complete(info, path, role)
    if is_gguf(path):
        gguf_file.require_file_is_model(path, model)
    else:
        weights.require_taken_up(seen.unexpected, stored, model, config.to_dict(), path, role)
    keep_attention_cap(model, attn_implementation)
    if not packed:
        _to_one_dtype(model, dtype)
    if device is not None and options["device_map"] is None and tensor_parallel == 1:
        model.to(device)
    if packed or attn_implementation or tensor_parallel > 1:
        _require_runs(model, path, role)
    return model


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes a model of a configuration: of causal language models if it has one."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", None)
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return transformers.AutoModelForImageTextToText
        if kind in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
            return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and warnings of transformers: what they say is checked, and refused in one sentence."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)


def _require_complete(info: dict[str, Any], path: Path, role: str) -> None:
    """Refuse a model of which weights were invented: they are not in the files, or have another size there."""
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(f"the {role} {path} lacks {len(names)} of its weights, {names[0]} among them")
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"the {role} {path} holds {len(info['mismatched_keys'])} of its weights in another size than its "
            f"config.json says: {name} is {list(stored)}, not {list(wanted)}"
        )


def _to_one_dtype(model: Any, dtype: str) -> None:
    """Bring all parameters to one dtype, but those that the architecture keeps in float32.

    transformers leaves the weights of a dequantised checkpoint that were not quantised in the dtype of the file.
    """
    wanted = model.get_input_embeddings().weight.dtype if dtype == "auto" else getattr(torch, dtype)
    kept = tuple(model._get_dtype_plan(wanted))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != wanted and not any(part in name for part in kept):
            parameter.data = parameter.data.to(wanted)


def _require_runs(model: Any, path: Path, role: str) -> None:
    """Refuse a model that fails at its first token, where what runs depends on packages and on the machine."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"the {role} {path} is loaded, but cannot run: {one_line(error)}") from error


def keep_attention_cap(model: Any, asked: str | None = None) -> None:
    """Run a model that caps its attention logits (Gemma 2) by an attention that does so.

    Up to 5.20, transformers gives such a model `sdpa` unless another is named, and that silently leaves the cap out.

    Args:
        model: the model.
        asked: the attention that was asked for, if one was.

    Raises:
        ModelError: `sdpa` was asked for.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and model.config._attn_implementation == "sdpa":
        if asked == "sdpa":
            raise ModelError(f"{type(model).__name__} caps its attention logits, which attn_implementation sdpa omits")
        model.set_attn_implementation("eager")
