"""Rows on which it is measured what matters in a teacher: of a cache, or of a text.

Guarantee: rows that a training holds out are not among them.

Shapes: R rows, L slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.pretrained import load_tokenizer
from kdcache.rows import spread_rows
from kdcache.student.data import Rows, batches, labelled

_ROWS = 16
_LAYER_POSITIONS = 500
_TEXT_SLOTS = 512
_CHARACTERS = 32
"""Characters of a text that are read for a slot; hardly any token is longer."""

Batches = Callable[[], Iterator[dict[str, Any]]]
"""Gives batches of `input_ids` and `position_ids` `[R, L]`, and `slots` `[R, L]` bool: those that count."""


def rows_for_width(rows: Rows, count: int | None) -> list[int]:
    """So many of some rows, evenly spread, for the one pass that width takes; as many as are usual if None."""
    return spread_rows(rows, count or _ROWS)


def rows_for_layers(cache: Cache, rows: Rows, count: int | None) -> list[int]:
    """So many of some rows of a cache, for the many passes that layers take; if None, for about 500 positions."""
    if count is None:
        count = math.ceil(_LAYER_POSITIONS * len(cache) / max(1, cache.commits.total("positions")))
    return spread_rows(rows, max(1, count))


def of_cache(cache: Cache, rows: Rows, batch_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of a cache; the slots with a label count."""
    for batch in batches(cache, rows, batch_rows):
        yield {**batch, "slots": labelled(batch)}


def of_text(
    path: Path, folder: Path, count: int | None, batch_rows: int, longest: int | None
) -> Iterator[dict[str, Any]]:
    """The first rows of a text file, one context each.

    Args:
        path: of the file, in UTF-8.
        folder: of the teacher, whose tokenizer is taken.
        count: rows, at most; as many as are usual if None.
        batch_rows: rows a batch.
        longest: the most slots that the teacher takes; None if it does not say.

    Raises:
        ConfigError: the file cannot be read, or holds less than two tokens.
        ModelError: the tokenizer cannot be used.
    """
    count, slots = count or _ROWS, min(_TEXT_SLOTS, longest or _TEXT_SLOTS)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(count * slots * _CHARACTERS)
    except UnicodeDecodeError:
        raise ConfigError(f"text {path} cannot be read: it is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"text {path} cannot be read: {error.strerror or error}") from None
    ids = load_tokenizer(folder).encode(text, verbose=False)[: count * slots]
    if len(ids) < 2:
        raise ConfigError(f"text {path} has {len(ids)} token(s), too few to measure anything on")
    slots = min(slots, len(ids))
    rows = torch.tensor(ids[: len(ids) // slots * slots]).view(-1, slots)  # [R, L]
    for part in (rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)):
        places: Tensor = torch.arange(slots).expand_as(part)
        yield {"input_ids": part, "position_ids": places, "slots": torch.ones_like(part, dtype=torch.bool)}
