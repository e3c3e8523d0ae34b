"""Which worker is given which shard, when workers die, fail or refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from kdcache.crew.assign import Answer, run
from kdcache.crew.tasks import FINISH, MAKE, OPEN, Outcome, Task
from kdcache.errors import CorpusError, LaunchError

SHARDS = dict.fromkeys(range(6), 10)


class Scripted:
    """Workers that do each task at once, but for those that `fate` has something else for."""

    def __init__(self, count: int, fate: dict[tuple[str, int], list[str]]) -> None:
        self.count, self.fate = count, fate
        self.answered: deque[Answer] = deque()
        self.made: list[int] = []
        self.started: list[int] = []

    def start(self, worker: int) -> None:
        self.started.append(worker)

    def ask(self, worker: int, task: Task) -> None:
        fates = self.fate.get((task.kind, task.shard))
        fate = fates.pop(0) if fates else "done"
        if fate == "hangs":
            return
        if fate == "dies":
            self.answered.append(Answer(worker, died="died"))
        elif fate == "fails":
            self.answered.append(Answer(worker, outcome=Outcome(crashed="Traceback of it")))
        elif fate == "refuses":
            self.answered.append(Answer(worker, outcome=Outcome(refused=("CorpusError", "no such corpus"))))
        else:
            self.answered.append(Answer(worker, outcome=Outcome(value=self._value(task))))

    def _value(self, task: Task) -> object:
        if task.kind == OPEN:
            return [[shard, documents] for shard, documents in SHARDS.items()]
        if task.kind == FINISH:
            return {"shards": {"planned": 6, "committed": len(self.made)}}
        self.made.append(task.shard)
        return [True, 100, {"waited": 0.25, "copied": 7}]

    def answers(self, seconds: float) -> Iterator[Answer]:
        while self.answered:
            yield self.answered.popleft()


def test_every_shard_is_made_once_and_counted() -> None:
    crew, shown = Scripted(2, {}), []
    done = run(crew, lambda *figures: shown.append(figures))
    assert sorted(crew.made) == list(SHARDS) and crew.started == [0, 1]
    assert done.made == 6 and done.amount == 600 and done.workers == 2 and done.replaced == 0
    assert done.totals == {"waited": 1.5, "copied": 42} and done.summary["shards"]["planned"] == 6
    assert shown[-1] == (60, 60, 600)


@pytest.mark.parametrize("fate", ["dies", "fails"])
def test_a_shard_whose_workers_end_twice_is_made_by_the_third(fate: str) -> None:
    crew = Scripted(2, {(MAKE, 3): [fate, fate]})
    assert run(crew, None).replaced == 2
    assert sorted(crew.made) == list(SHARDS)


def test_a_shard_that_ends_three_workers_is_named() -> None:
    with pytest.raises(LaunchError, match=r"^shard 3 ended 3 workers, one after the other; the last one died$"):
        run(Scripted(2, {(MAKE, 3): ["dies"] * 3}), None)
    with pytest.raises(RuntimeError, match=r"shard 3 ended 3 workers(.|\n)*Traceback of it"):
        run(Scripted(2, {(MAKE, 3): ["fails", "dies", "fails"]}), None)


def test_a_worker_that_dies_each_time_it_opens_the_cache() -> None:
    with pytest.raises(LaunchError, match=r"^the task to open the output ended 3 workers"):
        run(Scripted(2, {(OPEN, -1): ["dies"] * 3}), None)


def test_what_a_worker_refuses_is_not_tried_again() -> None:
    crew = Scripted(2, {(MAKE, 3): ["refuses"]})
    with pytest.raises(CorpusError, match=r"^no such corpus$"):
        run(crew, None)


def test_a_worker_that_never_starts_keeps_nobody_waiting() -> None:
    crew = Scripted(2, {(OPEN, -1): ["done", "hangs"]})
    assert run(crew, None).summary["shards"]["committed"] == 6


def test_the_end_is_left_to_another_if_its_worker_dies() -> None:
    crew = Scripted(2, {(FINISH, -1): ["dies"]})
    assert run(crew, None).made == 6
