"""Fixtures of the tests of losses."""

from __future__ import annotations

import pytest

from kdcache.losses import target_losses


@pytest.fixture
def tails_have_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tail has said already that it is biased."""
    monkeypatch.setattr(target_losses, "_warned", set(target_losses.TAILS))
