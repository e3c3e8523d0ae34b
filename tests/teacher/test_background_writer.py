"""Work beside the forward pass keeps its order, its errors and its bounds."""

from __future__ import annotations

import threading

import pytest

from kdcache.teacher.background_writer import BackgroundWriter


def test_tasks_run_in_order_and_the_caller_waits_for_those_that_are_behind() -> None:
    done: list[int] = []
    gate = threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(gate.wait)
        writer.submit(lambda: done.append(1))
        assert done == []
        threading.Timer(0.2, gate.set).start()
        writer.submit(lambda: done.append(2))  # a third on its way: waits for the gate
        assert writer.stalled_seconds > 0.1
        writer.finish()
    assert done == [1, 2]


def test_an_error_reaches_the_caller_and_what_follows_is_dropped() -> None:
    def fail() -> None:
        raise OSError("disk full")

    done: list[int] = []
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as writer:
        writer.submit(fail)
        for n in range(5):
            writer.submit(lambda n=n: done.append(n))  # type: ignore[misc]
        writer.finish()
    assert len(done) <= 2


def test_leaving_early_waits_for_the_task_that_runs() -> None:
    started, done = threading.Event(), []

    def slow() -> None:
        started.set()
        threading.Event().wait(0.2)
        done.append(1)

    with pytest.raises(RuntimeError), BackgroundWriter() as writer:
        writer.submit(slow)
        started.wait()
        raise RuntimeError
    assert done == [1]
