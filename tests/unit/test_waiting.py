"""The share of time that a step waited, on a clock that the test winds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdcache.student.trainer import Waiting


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_the_loader_counts_and_not_its_start() -> None:
    clock = Clock()

    def loader() -> Iterator[int]:
        for number, seconds in enumerate((100.0, 3.0, 0.0, 1.0)):
            clock.now += seconds
            yield number

    waiting, batches, seen = Waiting(clock), loader(), []
    assert waiting.share() == waiting.share_since_told() == 0
    shares = []
    for _ in range(2):  # a step asks for two, through a wrapper of its own
        step = waiting.watch(batches)
        for _ in range(2):
            seen.append(next(step))
            clock.now += 4.0  # work
        shares.append(waiting.share_since_told())
    assert seen == [0, 1, 2, 3] and list(waiting.watch(batches)) == []
    assert shares == [pytest.approx(3 / 11), pytest.approx(1 / 9)]  # 4 + 3 + 4 s, then 0 + 4 + 1 + 4 s
    assert waiting.share() == pytest.approx(4 / 20)
