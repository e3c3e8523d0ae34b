"""The files of a model: found, whole, and fingerprinted.

A model is a folder in the form of Hugging Face (configuration, tokenizer and safetensors weights) or one .gguf file. A
path to the folder or to the file stands for it everywhere.

Guarantee: a fingerprint is of content, so the same weights under another path or name are the same teacher. A model of
which a weight file is missing is refused before anything is loaded.
Cost: weights are hashed once a machine (`kdcache.file_hashes`).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from kdcache.errors import ModelError, one_line
from kdcache.file_hashes import file_sha256
from kdcache.store.sealed_json import canonical

_WEIGHTS = "*.safetensors"
_HUB_FILES = ["*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja"]
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.\w+)")
"""Name of one of several files that hold a model together."""


def model_folder(name: str, role: str) -> Path:
    """Where a model is: its folder, the hub's snapshot of a name, or its .gguf file.

    Args:
        name: a folder, a .gguf file, a folder with exactly one .gguf file and no other weights, or a hub name.
        role: `teacher` or `student`, for messages.

    Raises:
        ModelError: nothing there, or not all of its weights.
    """
    folder = Path(name).expanduser()
    if is_gguf(folder):
        return _whole_gguf(folder, role)
    if not folder.exists() and _HUB_NAME.fullmatch(name):
        folder = _snapshot(name, _HUB_FILES, role)
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"the {role} {name} is a file, but must be a folder or a .gguf file")
        raise ModelError(f"the {role} folder {name} does not exist")
    if not any(folder.glob("*.safetensors")):
        found = sorted(path for path in folder.iterdir() if is_gguf(path))
        if len(found) > 1:
            raise ModelError(
                f"the {role} folder {name} has {len(found)} .gguf files; name one of them, such as {found[0]}"
            )
        if found:
            return _whole_gguf(found[0], role)
    if not (folder / "config.json").is_file():
        raise ModelError(f"the {role} folder {name} has no config.json")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"the {role} folder {name} has an adapter (adapter_config.json), not the weights of a model alone; merge "
            "the adapter into its base model and save that"
        )
    weight_files(folder, role)
    return folder


def tokenizer_folder(name: str) -> Path:
    """Where a tokenizer is: its folder, a .gguf file, or the hub's snapshot of a name; no weights are fetched.

    Raises:
        ModelError: nothing there.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"the tokenizer folder {name} does not exist")
    return _snapshot(name, [pattern for pattern in _HUB_FILES if pattern != _WEIGHTS], "tokenizer")


def _snapshot(name: str, patterns: list[str], role: str) -> Path:
    """The local folder of a hub name.

    Raises:
        ModelError: there is none of this name, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"the {role} {name} is neither a folder here nor on the hub ({one_line(error)})") from error


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix.lower() == ".gguf"


def _whole_gguf(path: Path, role: str) -> Path:
    if not path.is_file():
        raise ModelError(f"the {role} file {path} does not exist")
    part = _PART.fullmatch(path.name)
    if part and part[3] != "00001":
        raise ModelError(
            f"the {role} {path} is one of {int(part[3])} files of a model, which cannot be read; merge them with "
            "`llama-gguf-split --merge`"
        )
    return path


def weight_files(path: Path, role: str) -> list[Path]:
    """The files that a model's weights are read from: the .gguf file itself, or safetensors.

    Raises:
        ModelError: there are none, or one of them is not there.
    """
    if is_gguf(path):
        return [path]
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    present = sorted(path.glob("*.safetensors"))
    if not present:
        raise ModelError(f"the {role} folder {path} has no weights in safetensors format")
    names = _indexed(index) if index.is_file() else {name for file in present for name in _siblings(file)}
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the {role} folder {path} lacks {missing[0]}{more} of the {len(names)} files that hold its weights"
        )
    if not index.is_file():
        raise ModelError(
            f"the {role} folder {path} has neither model.safetensors nor {index.name}, which says what the "
            f"{len(present)} .safetensors files there hold"
        )
    return [path / name for name in sorted(names)]


def _indexed(index: Path) -> set[str]:
    """The files that an index of weights names."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} is not an index of weight files")
    return names


def _siblings(file: Path) -> list[str]:
    """The files that a file's name counts it among, such as 3 for model-00001-of-00003.safetensors."""
    part = _PART.fullmatch(file.name)
    if part is None:
        return [file.name]
    return [f"{part[1]}{number:05d}-of-{part[3]}{part[4]}" for number in range(1, int(part[3]) + 1)]


def fingerprint(path: Path) -> str:
    """sha256 over a model's configuration and weight files, by content."""
    digest = hashlib.sha256()
    if is_gguf(path):
        digest.update(b"gguf")
        digest.update(file_sha256(path).encode())
        return digest.hexdigest()
    config = json.loads((path / "config.json").read_bytes())
    digest.update(canonical({k: v for k, v in config.items() if k not in _VOLATILE}))
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()
