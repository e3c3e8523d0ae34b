"""Work in threads: in order, begun ahead, made once."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from kdcache.store.storage import LastUsed, map_ahead


def test_results_come_in_order_and_the_next_have_begun() -> None:
    begun, gates = threading.Semaphore(0), [threading.Event() for _ in range(10)]

    def work(i: int) -> int:
        begun.release()
        gates[i].wait(timeout=30)
        return i * i

    found = map_ahead(work, range(10), at_once=4)
    for i in (3, 2, 1, 0):
        gates[i].set()  # the last is done first
    assert next(found) == 0
    for _ in range(4):
        assert begun.acquire(timeout=30)
    for gate in gates:
        gate.set()
    assert list(found) == [i * i for i in range(1, 10)]
    assert list(map_ahead(work, [], at_once=4)) == []


def test_an_error_comes_at_its_turn_and_the_rest_is_dropped() -> None:
    done: Counter[int] = Counter()

    def work(i: int) -> int:
        if i == 3:
            raise ValueError(i)
        done[i] += 1
        return i

    found = map_ahead(work, range(1000), at_once=2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(found)
    assert sum(done.values()) < 10 and threading.active_count() < 50
    left = map_ahead(work, range(1000), at_once=2)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert sum(done.values()) < 20


def test_what_many_ask_for_is_made_once() -> None:
    recent, made, gate = LastUsed[int](2), Counter[str](), threading.Barrier(8, timeout=30)

    def make(key: str) -> int:
        made[key] += 1
        return len(made)

    def ask() -> None:
        gate.wait()
        recent.get("a", lambda: make("a"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {"a": 1}
    for key in "bacad":  # a is asked for again and stays; b and c leave
        recent.get(key, lambda key=key: make(key))
    assert made == {"a": 1, "b": 1, "c": 1, "d": 1}
    recent.get("b", lambda: make("b"))
    assert made["b"] == 2


def test_an_error_is_not_kept() -> None:
    recent = LastUsed[int](2)

    def fail() -> int:
        raise ValueError

    with pytest.raises(ValueError):
        recent.get("a", fail)
    assert recent.get("a", lambda: 5) == 5
