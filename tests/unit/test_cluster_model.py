"""The simulation behind docs/cluster.md, where its answer can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.cluster_model import Cluster, Outcome, Protocol, simulate

NOTHING: dict[str, float] = {}
FREE = Protocol(**dict.fromkeys(("create", "join", "shard", "finish", "finish_own", "seal", "seal_each"), NOTHING))


def run(**changes: Any) -> Outcome:
    return simulate(Cluster(**{"workers": 1, "shards": 8, "shard_seconds": 10.0, "protocol": FREE, **changes}))


@pytest.mark.parametrize(("workers", "seconds"), [(1, 80), (2, 40), (3, 30), (8, 10), (20, 10)])
def test_shards_are_divided(workers: int, seconds: float) -> None:
    found = run(workers=workers, start=5.0, create=2.0)
    assert found.makespan == seconds + 7 and found.lost_seconds == 0
    assert found.efficiency == pytest.approx(80 / (workers * (seconds + 7)))


def test_a_killed_worker_loses_the_shard_that_it_was_at() -> None:
    found = run(workers=2, start=5.0, requeue=30.0, kills=((1, 28.0),))  # in its third shard
    assert found.lost_seconds == 3 and found.starts == 3
    assert found.makespan == 28 + 30 + 5 + 20


def test_one_that_is_killed_while_it_starts_has_lost_the_start() -> None:
    found = run(start=5.0, requeue=1.0, kills=((0, 3.0),))
    assert found.lost_seconds == 3 and found.makespan == 3 + 1 + 5 + 80


def test_two_make_a_shard_and_one_counts() -> None:
    found = run(mtbf=40.0, twins=1.0, seed=3)  # lost before its shards are made, and goes on
    assert found.starts > 1 and found.twice > 0
    assert found.lost_seconds >= 10 * found.twice


def test_a_preempted_worker_keeps_a_shard_that_ends_within_its_grace() -> None:
    lost = [run(preempted=25.0, grace=grace, requeue=1.0).lost_seconds for grace in (0.0, 10.0)]
    assert lost[0] > 0 == lost[1]


def test_idle_workers_take_what_a_slow_one_or_a_lost_one_leaves() -> None:
    slow = {"workers": 20, "shards": 200, "slow_nodes": 0.2, "slowness": 5.0}
    assert run(**slow, shared=True).makespan < 0.6 * run(**slow).makespan == 300
    lost = run(workers=2, shards=2, shared=True, kills=((1, 9.0),), requeue=1000.0)
    assert lost.makespan == 20 and lost.lost_seconds == 9


def test_requests_are_counted_and_take_their_time() -> None:
    counted = Protocol(
        create={"PUT": 3}, join={"GET": 2, "LIST": 1}, shard={"PUT": 2, "GET": 1}, finish={"LIST": 1},
        finish_own={"GET": 1}, seal={"PUT": 1}, seal_each={"GET": 1}, beat={"PUT": 1},
    )  # fmt: skip
    found = run(workers=2, protocol=counted, beat=4.0)
    made = {"PUT": 8 * (2 + 2), "GET": 8}  # a shard of 10 s has two heartbeats
    assert found.requests == {"PUT": 3 + made["PUT"] + 1, "GET": 2 + made["GET"] + 4 + 8, "LIST": 1 + 1}
    slow = run(protocol=counted, latency=0.5)
    assert slow.makespan == pytest.approx(80 + 3 * 0.5 + 8 * 3 * 0.5 + 0.5 + 8 * 0.5 / 16)
    assert run(protocol=counted, limit=0.1).makespan == pytest.approx((3 + 8 * 3 + 1 + 8) / 0.1, rel=0.3)


def test_a_seed_decides_everything() -> None:
    wild: dict[str, Any] = {"workers": 30, "shards": 300, "spread": 0.5, "mtbf": 100.0, "requeue": 5.0}
    assert run(**wild, seed=1).makespan == run(**wild, seed=1).makespan != run(**wild, seed=2).makespan
    assert math.isfinite(run(**wild, preempted=50.0, twins=0.5, shared=True).makespan)
