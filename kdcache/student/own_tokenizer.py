"""A student's own tokenizer: checked against the cache's, and kept.

Guarantee: an id of the cache means the same token in the student's tokenizer, or stands nowhere in the cache's rows.
What the student has beside that stays its own: its chat template, and tokens that the cache does not know.
Cost: two vocabularies are compared. Where the student lacks tokens, the rows are read once, until one has such a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdcache.cache import Cache
from kdcache.errors import ModelError
from kdcache.pretrained import has_tokenizer, load_tokenizer

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The files of a tokenizer, as transformers names them."""


@dataclass(frozen=True)
class OwnTokenizer:
    """The tokenizer that a checkpoint brings.

    Attributes:
        files: its content, by name.
        absent: the cache's tokens that it lacks, by id.
    """

    files: dict[str, bytes]
    absent: dict[int, str] = field(default_factory=dict)


def read_own_tokenizer(folder: Path, cache: Cache, role: str = "student") -> OwnTokenizer | None:
    """The tokenizer of a checkpoint, with the cache's chat template if it has none itself; None if there is none.

    Args:
        folder: of the checkpoint; of a .gguf file the tokenizer is checked, and no files are kept.
        cache: what the student learns from.
        role: `student`, or `teacher` for one that a student is cut out of; for messages.

    Raises:
        ModelError: it gives an id of the cache another meaning.
    """
    if not has_tokenizer(folder):
        return None
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if not cache.manifest.tokenizer_files:
        return OwnTokenizer(files)
    own, theirs = load_tokenizer(folder), cache.load_tokenizer()
    known, absent = own.get_vocab(), {}
    ids = set(known.values())
    for token, number in theirs.get_vocab().items():
        if known.get(token) == number:
            continue
        if token in known or number in ids:
            raise ModelError(
                f"the {role} {folder} has another tokenizer than the cache: {token!r} is id {number} in the cache "
                f"and {known.get(token, 'absent')} in the {role}"
            )
        absent[number] = token
    if own.chat_template is None and isinstance(theirs.chat_template, str):
        files["chat_template.jinja"] = theirs.chat_template.encode()
    return OwnTokenizer(files, absent)


def require_unused(
    absent: Mapping[int, str],
    caches: Iterable[Cache],
    student: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Refuse caches in whose rows one of these tokens stands; warn of the others.

    Args:
        absent: tokens that the student's tokenizer lacks, by id.
        caches: what it learns from.
        student: its name, for messages.
        on_progress: called with rows read and rows to read.

    Raises:
        ModelError: naming the token, and the row.
    """
    opened = list(caches)
    lacking, total, done = np.array(sorted(absent)), sum(map(len, opened)), 0
    for cache in opened:
        for number, (row, _) in enumerate(cache.read_rows(range(len(cache)))):
            found = row.tokens[np.isin(row.tokens, lacking)]
            if len(found):
                raise ModelError(
                    f"the tokenizer of the student {student} has no token {absent[int(found[0])]!r}, which row "
                    f"{number} of {cache.storage} has (id {found[0]})"
                )
            done += 1
            if on_progress:
                on_progress(done, total)
    warnings.warn(
        f"the tokenizer of the student {student} lacks {len(absent)} tokens of the cache, {min(absent.values())!r} "
        f"among them; none of the {total} rows has one, so it keeps its own tokenizer",
        stacklevel=2,
    )
