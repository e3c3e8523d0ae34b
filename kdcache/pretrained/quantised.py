"""Quantised weights: which forms are loaded, and how.

FP8, compressed tensors and GGUF are dequantised when they are loaded: on every device the model then computes with the
same weights, in one dtype. MXFP4 is dequantised on a CPU. Other forms keep their packed weights, and transformers runs
them with the package that made them.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError
from kdcache.lazy_torch import torch
from kdcache.pretrained.files import is_gguf

_PACKAGES = {
    "aqlm": ("aqlm",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
}
"""The packages that transformers needs for a form."""


def quantisation(path: Path) -> str | None:
    """The form of a model's quantised weights, as its configuration names it; None if it names none.

    Raises:
        ModelError: the configuration has a quantisation without a name, or is not JSON.
    """
    if is_gguf(path):
        return "gguf"
    try:
        config = json.loads((path / "config.json").read_bytes())
    except ValueError as error:
        raise ModelError(f"{path / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} is not a configuration")
    text = config.get("text_config")
    settings = config.get("quantization_config") or (text or {}).get("quantization_config")
    if not settings:
        return None
    form = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        form = "bitsandbytes"
    if not isinstance(form, str):
        raise ModelError(f"{path / 'config.json'} has a quantization_config without a quant_method")
    return form


def loading_options(path: Path, role: str, device: torch.device | None) -> dict[str, Any]:
    """What `from_pretrained` is given beside the rest for a model's quantised weights; nothing for others.

    Raises:
        ModelError: transformers does not know the form, or needs a package for it that is not installed.
    """
    form = quantisation(path)
    if form is None:
        return {}
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    if form not in KNOWN and form != "bitsandbytes":
        raise ModelError(
            f"the {role} {path} is quantised by {form}, which transformers {transformers.__version__} does not know"
        )
    missing = [package for package in _PACKAGES.get(form, ()) if find_spec(package.replace("-", "_")) is None]
    if missing:
        raise ModelError(
            f"the {role} {path} is quantised by {form}, for which transformers needs the package {missing[0]}, which "
            f"is not installed: pip install {' '.join(missing)}"
        )
    dequantised = form in ("fp8", "mxfp8", "compressed-tensors", "gguf")
    if form == "mxfp4" and device is not None and device.type == "cpu":
        dequantised = True
    return {"quantization_config": KNOWN[form](dequantize=True)} if dequantised else {}


def require_dense(path: Path, role: str) -> None:
    """Refuse a model whose weights are quantised.

    Raises:
        ModelError: naming the form.
    """
    form = quantisation(path)
    if form is not None:
        raise ModelError(
            f"the {role} {path} is quantised ({form}), and quantised weights cannot be trained, with adapters neither; "
            "give the checkpoint that it was made from"
        )
