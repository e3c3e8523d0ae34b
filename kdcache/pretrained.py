"""Pretrained: where the files of a model are, what they hold, and how they are loaded.

Weights are safetensors only; remote code never runs. The fingerprint is of content: the same weights under another path
or name are the same teacher. Cost: weights are hashed once a machine (`kdcache.file_hashes`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError, ModelError
from kdcache.file_hashes import file_sha256
from kdcache.lazy_torch import torch
from kdcache.store.sealed_json import canonical

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def model_folder(name: str, role: str) -> Path:
    """The local folder of a model: the folder itself, or the hub's snapshot of a name.

    Raises:
        ModelError: nothing there, or no weights.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        except Exception as error:
            raise ModelError(
                f"the {role} {name} is neither a folder here nor on the hub ({one_line(error)})"
            ) from error
    if not folder.is_dir():
        raise ModelError(f"the {role} folder {name} does not exist")
    if not (folder / "config.json").is_file():
        raise ModelError(f"the {role} folder {name} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"the {role} folder {name} has no weights in safetensors format")
    return folder


def fingerprint(folder: Path) -> str:
    """sha256 over a model's configuration and weight files, by content."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_bytes())
    digest.update(canonical({k: v for k, v in config.items() if k not in _VOLATILE}))
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ModelError: there is none that loads.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(f"the folder {folder} has no tokenizer: none of {', '.join(_VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides a tokenizer's output: its model, added tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "model": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(canonical(parts)).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """Ids that the tokenizer can produce lie below this; `len(tokenizer)` unless its ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


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
    folder: Path, role: str, dtype: str, device: torch.device | None = None, device_map: str | None = None
) -> Any:
    """Load a causal language model whose every weight is in its files.

    Raises:
        ModelError: transformers cannot make one of the folder, or would have to invent weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise ModelError(f"the {role} {folder} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(f"the {role} {folder} lacks {len(names)} of its weights, {names[0]} among them")
    keep_attention_cap(model)
    return model if device is None or device_map is not None else model.to(device)


def keep_attention_cap(model: Any) -> None:
    """Run a model that caps its attention logits (Gemma 2) by an attention that does so.

    Up to 5.20, transformers gives such a model `sdpa` unless another is named, and that silently leaves the cap out.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration, its class's defaults included.

    Raises:
        ModelError: transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict())
    except Exception as error:
        raise ModelError(
            f"{folder / 'config.json'} is not a configuration that can be used: {one_line(error)}"
        ) from error


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that a model was made for, or None if its configuration does not say."""
    for scope in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
            if isinstance(scope.get(name), int):
                return int(scope[name])
    return None


def one_line(error: BaseException) -> str:
    """The first line of what a library said, and the next when the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def hidden_width(folder: Path) -> int | None:
    """Width of the hidden states that a model's output head is given, or None if its configuration does not say.

    Raises:
        ModelError: transformers does not know the model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    except Exception as error:
        raise ModelError(
            f"{folder / 'config.json'} is not a configuration that can be used: {one_line(error)}"
        ) from error
    width = getattr(config, "word_embed_proj_dim", None) or getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None
