"""Which share of the shards is mine."""

from __future__ import annotations

import pytest

from kdcache.errors import ConfigError
from kdcache.worker import Worker, find_worker


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_shard_has_one_worker(count: int) -> None:
    for shard in range(20):
        assert sum(Worker(i, count).owns(shard) for i in range(count)) == 1


SLURM = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_COUNT": "5",
    "SLURM_ARRAY_TASK_STEP": "2",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("named", "environment", "expected"),
    [
        (None, {}, Worker(0, 1)),
        ("2/3", {**SLURM, **TORCHRUN}, Worker(2, 3)),
        (None, TORCHRUN, Worker(1, 4)),
        (None, SLURM, Worker(2, 5)),
        (None, {**SLURM, **TORCHRUN}, Worker(9, 20)),
    ],
)
def test_where_a_worker_is_named(named: str | None, environment: dict[str, str], expected: Worker) -> None:
    assert find_worker(named, environment) == expected


@pytest.mark.parametrize("named", ["3/3", "0/0", "1", "a/b", "-1/2", "1/2/3"])
def test_bad_names(named: str) -> None:
    with pytest.raises(ConfigError):
        find_worker(named, {})


def test_bad_variables() -> None:
    with pytest.raises(ConfigError, match="RANK is 'x'"):
        find_worker(None, {"RANK": "x", "WORLD_SIZE": "2"})


def test_an_uneven_array_is_refused() -> None:
    uneven = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    with pytest.raises(ConfigError, match="not evenly spaced"):
        find_worker(None, uneven)
