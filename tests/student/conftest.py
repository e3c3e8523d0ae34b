"""Fixtures of the tests of students."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def curves() -> Iterator[None]:
    """What would be drawn is written instead: a picture takes longer than such a training. test_model_card.py draws."""
    from kdcache.student import model_card

    def write(path: Path, lines: Sequence[dict[str, Any]], heldout: Sequence[Any]) -> None:
        drawn = [[line.get(name) for name in ("step", "loss", "nll", "kl", "learning_rate")] for line in lines]
        path.write_text(repr((drawn, heldout)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "draw_run", write)
        yield
