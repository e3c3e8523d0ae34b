"""A dump by many workers as discrete events: what is lost to failures, stragglers and the store, without running it.

The protocol is that of kdcache: worker I of N makes the shards s with s mod N = I (or, `shared`, whoever is idle takes
the next missing one); a shard counts when it is committed; a worker that is lost comes back after a while, asks what is
committed, and loses only the shard that it was at. What the protocol asks of the store is a `Protocol`, counted from
the real code by `count_requests`.
Guarantee: a function of the cluster and its seed; no clock is read.

Not modelled: a network that is slow for everybody, a file system that stalls, shards that fail by themselves.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import numpy as np

PAGE = 1000
"""Names in one answer to a listing."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Requests of each step of a dump by kind: `GET`, `HEAD`, `PUT`, `DELETE`, `LIST` of all shards, `LOOK` for a name.

    Attributes:
        create: of a worker that starts where no cache is.
        join: of a worker that starts where one is.
        shard: of making a shard, its commit included.
        finish: of the end of a worker while shards are missing; and `finish_own` for each shard of its own.
        seal: of the end of the worker that finds the cache complete; and `seal_each` for each shard of the cache.
        beat: of a heartbeat.
    """

    create: Mapping[str, float]
    join: Mapping[str, float]
    shard: Mapping[str, float]
    finish: Mapping[str, float]
    finish_own: Mapping[str, float]
    seal: Mapping[str, float]
    seal_each: Mapping[str, float]
    beat: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers, shards, and what befalls them. All times are in seconds.

    Attributes:
        workers, shards: how many.
        shard_seconds, spread: the mean of a shard on an ordinary node, and the standard deviation of its logarithm.
        start: from the launch of a worker until it can make shards: imports, weights, probe.
        create: what a worker needs beside that where no cache is yet: survey and pilot.
        slow_nodes, slowness: the share of nodes that are slower, and by how much.
        mtbf: mean time between failures of a node; infinite for none.
        preempted: mean time until a worker is preempted; infinite for never.
        grace: what a preempted worker is given; a shard that ends within it is kept.
        requeue: until a lost worker runs again.
        twins: the share of failures after which the lost process goes on with its shard, cut off from the scheduler but
            not from the store, so that two make the same shard.
        shared: whether idle workers take the next missing shard, instead of each its own.
        latency: of a request; limit: requests that the store answers in a second.
        at_once: requests that a worker has open where it may have several.
        beat: between two heartbeats; 0 for none.
        kills: workers that are lost at a time of their own: `(worker, seconds)`.
        seed: of all draws.
    """

    workers: int
    shards: int
    shard_seconds: float
    protocol: Protocol
    spread: float = 0.0
    start: float = 0.0
    create: float = 0.0
    slow_nodes: float = 0.0
    slowness: float = 2.0
    mtbf: float = math.inf
    preempted: float = math.inf
    grace: float = 0.0
    requeue: float = 0.0
    twins: float = 0.0
    shared: bool = False
    latency: float = 0.0
    limit: float = math.inf
    at_once: int = 16
    beat: float = 0.0
    kills: tuple[tuple[int, float], ...] = ()
    seed: int = 0


@dataclass
class Outcome:
    """What became of a dump.

    Attributes:
        makespan: seconds until the cache is complete and sealed.
        teacher_seconds: of all shards, each once, on ordinary nodes.
        workers: as in the cluster.
        lost_seconds: of shards that were begun and not committed, and of starts that were cut short.
        twice: shards that two workers made to the end.
        starts: of workers.
        requests: by kind.
        busiest: most requests begun in one minute, by the second.
    """

    workers: int
    teacher_seconds: float
    makespan: float = 0.0
    lost_seconds: float = 0.0
    twice: int = 0
    starts: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    minutes: Counter[int] = field(default_factory=Counter)

    @property
    def efficiency(self) -> float:
        """The part of the workers' time that made shards: 1 if nothing is lost and all end at once."""
        return self.teacher_seconds / (self.workers * self.makespan)

    @property
    def busiest(self) -> float:
        return max(self.minutes.values(), default=0) / 60


Steps = Generator[float, None, None]
"""Yields the times at which a process goes on."""


class _Run:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.random = cluster, np.random.default_rng(cluster.seed)
        mean = -(cluster.spread**2) / 2  # of the logarithm, so that the mean of the seconds is as given
        self.seconds = cluster.shard_seconds * self.random.lognormal(mean, cluster.spread, cluster.shards)
        self.outcome = Outcome(cluster.workers, float(self.seconds.sum()))
        self.committed = np.zeros(cluster.shards, bool)
        self.missing = cluster.shards
        self.now, self.store_free, self.exists = 0.0, 0.0, False
        self.queue: deque[int] = deque(range(cluster.shards))
        self.waiting: list[tuple[float, int, Steps]] = []
        self.numbers = itertools.count()
        self.kills = dict(cluster.kills)
        self.idle: list[int] = []

    def go(self) -> Outcome:
        for worker in range(self.cluster.workers):
            self.spawn(self.worker(worker))
        while self.waiting:
            self.now, number, steps = heapq.heappop(self.waiting)
            until = next(steps, None)
            if until is not None:
                heapq.heappush(self.waiting, (until, number, steps))
        return self.outcome

    def spawn(self, steps: Steps) -> None:
        heapq.heappush(self.waiting, (self.now, next(self.numbers), steps))

    def ask(self, requests: Mapping[str, float], times: float = 1.0, at_once: int = 1) -> float:
        """Count requests, and the time at which the store has answered them."""
        pages = max(1, math.ceil((self.cluster.shards - self.missing) / PAGE))
        total = 0.0
        for kind, count in requests.items():
            number = count * times * (pages if kind == "LIST" else 1)
            self.outcome.requests[kind] += round(number)
            total += number
        self.outcome.minutes[int(self.now // 60)] += round(total)
        self.store_free = max(self.store_free, self.now) + total / self.cluster.limit
        return max(self.now + self.cluster.latency * total / at_once, self.store_free)

    def node(self) -> float:
        """How much slower than an ordinary one the next node is."""
        return self.cluster.slowness if self.random.random() < self.cluster.slow_nodes else 1.0

    def own(self, worker: int) -> deque[int]:
        if self.cluster.shared:
            return self.queue
        return deque(s for s in range(worker, self.cluster.shards, self.cluster.workers) if not self.committed[s])

    def worker(self, worker: int, idle: bool = False) -> Steps:
        """A worker until it has nothing to do; one that is idle has started already."""
        cluster = self.cluster
        while True:
            failure = self.now + self.exponential(cluster.mtbf)
            if worker in self.kills and self.kills[worker] > self.now:
                failure = min(failure, self.kills.pop(worker))
            preempted = self.now + self.exponential(cluster.preempted)
            stop, graceful = min(failure, preempted), preempted < failure
            lost = (not idle and (yield from self.start(stop))) or (yield from self.life(worker, stop, graceful))
            if not lost:
                return
            idle = False
            yield self.now + cluster.requeue

    def start(self, stop: float) -> Generator[float, None, bool]:
        """Launch a process; whether it was stopped before it was ready."""
        self.outcome.starts += 1
        existed, protocol = self.exists, self.cluster.protocol
        ready = self.now + self.cluster.start + (0.0 if existed else self.cluster.create)
        if ready > stop:
            self.outcome.lost_seconds += stop - self.now
        yield min(ready, stop)
        if ready > stop:
            return True
        self.exists = True
        yield self.ask(protocol.join if existed else protocol.create)
        return False

    def life(self, worker: int, stop: float, graceful: bool) -> Generator[float, None, bool]:
        """Make shards; whether the process was stopped before it had no more to make."""
        cluster, protocol, slower = self.cluster, self.cluster.protocol, self.node()
        shards = self.own(worker)
        while shards:
            shard = shards.popleft()
            if self.committed[shard]:
                continue
            began, end = self.now, self.now + self.seconds[shard] * slower
            if end > stop + (cluster.grace if graceful else 0.0):
                if not graceful and self.random.random() < cluster.twins:
                    self.spawn(self.twin(shard, end))
                else:
                    self.outcome.lost_seconds += stop - began
                yield stop
                if cluster.shared:
                    shards.appendleft(shard)
                    if self.idle:
                        self.spawn(self.worker(self.idle.pop(), idle=True))
                return True
            yield end
            self.ask(self.beats(end - began))  # which nobody waits for
            yield self.ask(protocol.shard)
            self.commit(shard, end - began)
            if graceful and self.now > stop:
                return True
        last = self.missing == 0
        if last and not self.outcome.makespan:
            self.outcome.makespan = self.now  # until it is sealed
            yield self.ask(protocol.seal)
            yield self.ask(protocol.seal_each, times=cluster.shards, at_once=cluster.at_once)
            self.outcome.makespan = self.now
        elif cluster.shared:
            self.idle.append(worker)
        elif not last:
            yield self.ask(protocol.finish)
            own = cluster.shards / cluster.workers
            yield self.ask(protocol.finish_own, times=own, at_once=cluster.at_once)
        return False

    def twin(self, shard: int, end: float) -> Steps:
        """What a process that is taken for lost goes on with."""
        began = self.now
        yield end
        yield self.ask(self.cluster.protocol.shard)
        self.commit(shard, end - began)

    def commit(self, shard: int, seconds: float) -> None:
        if self.committed[shard]:
            self.outcome.twice += 1
            self.outcome.lost_seconds += seconds
        else:
            self.committed[shard] = True
            self.missing -= 1

    def beats(self, seconds: float) -> dict[str, float]:
        count = seconds // self.cluster.beat if self.cluster.beat else 0
        return {kind: number * count for kind, number in self.cluster.protocol.beat.items()}

    def exponential(self, mean: float) -> float:
        return math.inf if math.isinf(mean) else float(self.random.exponential(mean))


def simulate(cluster: Cluster) -> Outcome:
    """Run a cluster until its cache is complete."""
    return _Run(cluster).go()
