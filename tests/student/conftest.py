"""Fixtures of the tests of students."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kdcache.student.curves import Curves


@pytest.fixture(scope="module", autouse=True)
def curves() -> Iterator[None]:
    """What would be drawn is written instead: a picture takes longer than such a training. test_model_card.py draws."""
    from kdcache.student import model_card

    def write(path: Path, run: Curves) -> None:
        names = ("loss", "nll", "kl", "learning_rate")
        path.write_text(repr([(run.points(name), run.heldout_points(name)) for name in names]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "draw_run", write)
        yield
