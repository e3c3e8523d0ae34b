"""What the configuration of a model says, its class's defaults included."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError, one_line
from kdcache.pretrained.files import is_gguf
from kdcache.pretrained.gguf_file import require_gguf_package


def place(path: Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` of transformers is called with for a folder, or for a .gguf file."""
    if not is_gguf(path):
        return str(path), {}
    require_gguf_package(path)
    return str(path.parent), {"gguf_file": path.name}


def load_config(path: Path) -> Any:
    """A model's configuration, as transformers has it.

    Raises:
        ModelError: transformers does not know it.
    """
    if is_gguf(path):
        return copy.deepcopy(_load_gguf_config(path, path.stat().st_mtime_ns))
    return _load_config(path)


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    where, more = place(path)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **more)
    except Exception as error:
        what = path if more else path / "config.json"
        raise ModelError(f"{what} is not a configuration that can be used: {one_line(error)}") from error


@functools.lru_cache(maxsize=2)
def _load_gguf_config(path: Path, _changed: int) -> Any:
    """Of a .gguf file, which takes seconds: its tokens are read for it."""
    return _load_config(path)


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration as plain values.

    Raises:
        ModelError: transformers does not know it.
    """
    return dict(load_config(path).to_dict())


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that a model was made for, or None if its configuration does not say."""
    for scope in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
            if isinstance(scope.get(name), int):
                return int(scope[name])
    return None


def hidden_width(path: Path) -> int | None:
    """Width of the hidden states that a model's output head is given, or None if its configuration does not say.

    Raises:
        ModelError: transformers does not know the model.
    """
    config = load_config(path).get_text_config()
    width = getattr(config, "word_embed_proj_dim", None) or getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None


def layer_widths(path: Path) -> list[int]:
    """Width of the hidden states between a model's layers: what the first is given, then what each gives.

    Empty if its configuration does not say.

    Raises:
        ModelError: transformers does not know the model.
    """
    config = load_config(path).get_text_config()
    width, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    return [width] * (layers + 1) if isinstance(width, int) and isinstance(layers, int) else []
