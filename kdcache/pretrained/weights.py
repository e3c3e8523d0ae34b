"""Every weight of the files is in the model, or is known to be harmless.

transformers loads a checkpoint whose weights it does not take up, and only warns; for many architectures it does not
even warn. A scale that is dropped in this way leaves a model that runs, and is wrong. So every name that no part of the
model takes up is looked at here, and is refused unless it is one of these:

- further prediction layers, which only speculative decoding runs: `mtp.*`, `nextn.*`, and the layers after the last one
- towers for images and sound of a multimodal checkpoint, when only its text is run
- buffers that a model computes by itself: `rotary_emb.inv_freq`, `position_ids`, causal masks
  (`attn.bias`, `attn.masked_bias`)
- keys and values of layers that share those of an earlier layer (Gemma 3n and 4)
- an output head that equals the embeddings to which it is tied

Cost: the headers of the weight files are read once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError
from kdcache.lazy_torch import torch
from kdcache.pretrained.files import weight_files
from kdcache.pretrained.quantised import quantisation

_PREDICTION = re.compile(r"(^|\.)(mtp|nextn)\w*\.")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_TOWER = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|embed_vision|image_newline|vision_projection"
    r"|multi_modal_projector|mm_projector|audio_tower|audio_encoder|embed_audio|talker|token2wav|code2wav)(\.|$)"
)
_TOWER_CONFIGS = ("vision_config", "audio_config", "talker_config")
_COMPUTED = re.compile(r"(rotary_emb\.(original_)?inv_freq|(^|\.)position_ids)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
_SHARED = re.compile(r"\.self_attn\.([kv]_proj|[kv]_norm)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_SCALE = re.compile(
    r"(scales?|scale_inv|qscale_weight|qzeros|g_idx|absmax|quant_map|zero_point|SCB)$|quant_state|weight_scale"
)


@dataclass(frozen=True)
class Stored:
    """A weight as its file has it.

    Attributes:
        file: the safetensors file.
        dtype: as safetensors names it, such as `F8_E4M3`.
        shape: its sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Sequence[Path]) -> dict[str, Stored]:
    """The weights of safetensors files, by name.

    Raises:
        ModelError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is not a dictionary
                    part = opened.get_slice(name)
                    found[name] = Stored(file, str(part.get_dtype()), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ModelError(f"{file} is not a safetensors file that can be read: {error}") from None
    return found


def count_parameters(folder: Path) -> int | None:
    """Weights in the files of a model; None of one that is quantised or a .gguf file, or where there are no such files.

    Cost: the headers of its files are read.
    """
    try:
        if not folder.is_dir() or quantisation(folder) is not None:
            return None
        return sum(math.prod(weight.shape) for weight in read_headers(weight_files(folder, "model")).values())
    except (ModelError, OSError):
        return None


def require_scales(stored: Mapping[str, Stored], path: Path, role: str) -> None:
    """Refuse a checkpoint in which a quantised weight has no scale beside it: it would be read as it is.

    Raises:
        ModelError: naming one.
    """
    bare = []
    for name, weight in stored.items():
        stem = name.removesuffix(".weight")
        if weight.dtype in ("F8_E4M3", "F8_E5M2"):
            scales = {f"{name}_{s}" for s in ("scale_inv", "scale", "scales")} | {
                f"{stem}.scale",
                f"{stem}.qscale_weight",
            }
        elif weight.dtype == "U8" and name.endswith("_blocks"):
            scales = {f"{name.removesuffix('blocks')}scales"}
        else:
            continue
        if scales.isdisjoint(stored):
            bare.append(name)
    if bare:
        raise ModelError(
            f"the {role} {path} lacks the scales of {len(bare)} of its quantised weights, {min(bare)} among them"
        )


@dataclass
class Loading:
    """What transformers says while it loads, before it makes its own exceptions.

    Attributes:
        unexpected: names that no part of the model takes up.
        broken: why weights could not be converted, by name.
    """

    unexpected: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)


@contextmanager
def watch_loading() -> Iterator[Loading]:
    """Write down what is not taken up while models are loaded; what transformers then does is unchanged."""
    from transformers import PreTrainedModel

    seen, own = Loading(), PreTrainedModel._adjust_missing_and_unexpected_keys

    def note(self: Any, loading_info: Any) -> None:
        seen.unexpected.update(loading_info.unexpected_keys)
        seen.broken.update(loading_info.conversion_errors)
        own(self, loading_info)

    PreTrainedModel._adjust_missing_and_unexpected_keys = note
    try:
        yield seen
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = own


def require_taken_up(
    unexpected: set[str], stored: Mapping[str, Stored], model: Any, config: Mapping[str, Any], path: Path, role: str
) -> None:
    """Refuse a checkpoint with a weight that the model did not take up, unless it is harmless.

    Args:
        unexpected: the names of such weights.
        stored: the weights of its files.
        model: the loaded model.
        config: its configuration as plain values.
        path: of its files.
        role: for messages.

    Raises:
        ModelError: naming one, and how many there are.
    """
    left = sorted(name for name in unexpected if not _harmless(name, unexpected, stored, model, config))
    if not left:
        return
    scales = [name for name in left if _SCALE.search(name)]
    why = (
        "; without their scales quantised weights mean something else, and config.json names no quantisation that "
        "takes these"
        if scales
        else ""
    )
    what = "weight" if len(left) == 1 else "weights"
    raise ModelError(
        f"the {role} {path} has {len(left)} {what} that transformers does not take up, {(scales or left)[0]} among "
        f"them{why}"
    )


def _harmless(
    name: str, unexpected: set[str], stored: Mapping[str, Stored], model: Any, config: Mapping[str, Any]
) -> bool:
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers")
    found = _LAYER.search(name)
    layer = int(found[2]) if found else None
    if _PREDICTION.search(name):
        return True
    if layer is not None and isinstance(layers, int) and layer >= layers:
        announced = layer < layers + (text.get("num_nextn_predict_layers") or 0)
        start = name[: found.end()] if found else ""
        return announced or any(other.startswith(start) and ".eh_proj." in other for other in unexpected)
    if _TOWER.search(name):
        return any(config.get(key) for key in _TOWER_CONFIGS)
    if _SCALE.search(name):
        return False
    if _COMPUTED.search(name):
        return True
    weight = stored.get(name)
    if _MASK.search(name):
        return weight is not None and (weight.shape in ((), (1,)) or (len(weight.shape) == 4 and weight.shape[0] == 1))
    if _SHARED.search(name) and layer is not None and isinstance(layers, int):
        return layer >= layers - (text.get("num_kv_shared_layers") or 0)
    return weight is not None and bool(_HEAD.search(name)) and _equals_embeddings(name, weight, model)


def _equals_embeddings(name: str, weight: Stored, model: Any) -> bool:
    from safetensors import safe_open

    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embeddings or tuple(embeddings.shape) != weight.shape:
        return False
    with safe_open(weight.file, "pt") as opened:
        return torch.equal(opened.get_tensor(name).to(embeddings.dtype), embeddings.cpu())
