"""A tokenizer that gives the ids of its own file.

A checkpoint names the class that its tokenizer is made by, and some of these classes split text in their own way
whatever tokenizer.json says. So a fixed text is encoded by both, and must give the same ids.
Cost: tokenizer.json is read a second time, once a process for each content: half of what transformers takes for it.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError, ModelError, one_line
from kdcache.pretrained import gguf_file
from kdcache.pretrained.files import is_gguf
from kdcache.store.sealed_json import canonical

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

SAMPLE = (
    "The year 2024, it's 3.14159 and 1000000!  Two spaces,\tone tab\t\ttwo tabs.\n\n\n  def f(x):\n"
    "        return {'a': x**2, \"b\": [1, 22, 333]}  # don't\r\n    if x  ==  10:\n\tpass\n"
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u1e9b\u0323 \ufb01 \uff21\uff22 "
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea "
    "UPPER lower MiXeD_snake-kebab https://a.b/c?d=e&f=%20 \u00a0\u2003\u200b\u2026 'quoted' \u201ccurly\u201d  "
)
"""A text on which tokenizers differ: white space in runs, digits, code, accents composed and not, scripts without
spaces, joined emoji, odd spaces."""


def load_tokenizer(path: Path, chat_template: str | None = None) -> Any:
    """The tokenizer of a model's folder or .gguf file.

    Args:
        path: the folder or the file.
        chat_template: a file with a chat template, which takes the place of the tokenizer's own.

    Raises:
        ModelError: there is none that loads, or it gives other ids than its own file.
        ConfigError: the chat template cannot be read, or is not one.
    """
    tokenizer = _load_gguf(path) if is_gguf(path) else _load_folder(path)
    if chat_template is not None:
        _set_template(tokenizer, chat_template)
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether a folder has the files of a tokenizer; a .gguf file always has one."""
    return is_gguf(path) or any((path / name).is_file() for name in _VOCABULARIES)


def _load_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(folder):
        raise ModelError(f"the folder {folder} has no tokenizer: none of {', '.join(_VOCABULARIES)}")
    own = folder / "tokenizer.json"
    ids = _ids_of_file(own) if own.is_file() else None
    why = []
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False)
            difference = None if ids is None else _difference(_encode(tokenizer), ids)
        except Exception as error:
            why.append(f"it cannot be loaded: {one_line(error)}")
            continue
        if difference is None:
            return tokenizer
        why.append(f"{type(tokenizer).__name__} gives {difference}, other than its tokenizer.json")
    raise ModelError(f"the tokenizer in {folder} cannot be used: {why[0]}")


_IDS: dict[str, tuple[int, ...]] = {}
"""The ids of the sample by sha256 of a tokenizer.json: a process loads few, and each again and again."""


def _ids_of_file(path: Path) -> tuple[int, ...]:
    """The ids of the sample, by the library that tokenizer.json is made for."""
    from tokenizers import Tokenizer

    content = path.read_bytes()
    key = hashlib.sha256(content).hexdigest()
    if key not in _IDS:
        try:
            backend = Tokenizer.from_buffer(content)
        except Exception as error:
            raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
        backend.no_truncation()
        backend.no_padding()
        _IDS[key] = tuple(backend.encode(SAMPLE, add_special_tokens=False).ids)
    return _IDS[key]


def _encode(tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(SAMPLE, add_special_tokens=False, truncation=False, padding=False, verbose=False))


def _difference(found: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """The first id that differs, in words; None if none does."""
    for number, (one, other) in enumerate(itertools.zip_longest(found, wanted)):
        if one != other:
            one, other = ("nothing" if each is None else f"id {each}" for each in (one, other))
            return f"{one} and not {other} as number {number} of a text of white space, digits, accents, CJK and code"
    return None


def _load_gguf(path: Path) -> Any:
    """The tokenizer inside a .gguf file. There is no tokenizer.json, so what the file says of it is checked."""
    from transformers import AutoTokenizer

    gguf_file.require_gguf_package(path)
    try:
        made = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {one_line(error)}") from error
    tokenizer = gguf_file.make_tokenizer(path, made)
    gguf_file.require_round_trip(path, tokenizer, SAMPLE)
    return tokenizer


def _set_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer the chat template of a file."""
    from jinja2 import TemplateSyntaxError

    path = Path(name).expanduser()
    try:
        template = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"chat_template {name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"chat_template {name} is not a text in UTF-8") from None
    if not template.strip():
        raise ConfigError(f"chat_template {name} is empty")
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "."}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template {name} is not a Jinja template: {one_line(error)}") from None
    except Exception:  # a template may refuse this conversation, and take those of the corpus
        pass


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides a tokenizer's output: its model, added tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "model": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(canonical(parts)).hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """sha256 over what each id stands for: tokenizers of the same one give ids that mean the same to each other."""
    return hashlib.sha256(canonical(sorted(tokenizer.get_vocab().items()))).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """Ids that the tokenizer can produce lie below this; `len(tokenizer)` unless its ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
