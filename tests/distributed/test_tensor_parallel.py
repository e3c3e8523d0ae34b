"""A teacher that two processes hold together, each a part of every layer, gives the targets of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache.cache import open_cache
from kdcache.errors import ConfigError
from kdcache.teacher.config import DumpConfig, DumpOptions
from kdcache.teacher.dump import dump
from kdcache.verify import verify_cache
from kdcache.worker import Worker, find_worker
from tests.making import dump_options
from tests.processes import Ranks


def dumped(ranks: int, teacher: Path, corpus: Path, out: Path, *more: str) -> list[dict[str, object]]:
    """What the ranks print."""
    process = Ranks(
        ranks, "-m", "kdcache_cli", "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", out,
        "--seq-len", 64, "--k", 8, "--temperatures", "1,2", "--docs-per-shard", 30, "--batch-rows", 4,
        "--device", "cpu", "--precision", "float32", "--json", "--tensor-parallel", 2, *more,
    )  # fmt: skip
    said, words = process.communicate()
    assert process.returncode == 0, words
    return [json.loads(line) for line in said.splitlines()]


def require_same_targets(one: Path, two: Path) -> None:
    """Equal to the noise of float32; the entries of each position in any order."""
    a, b = open_cache(one), open_cache(two)
    assert len(a) == len(b) > 0
    for row, other in ((a[i], b[i]) for i in range(len(a))):
        assert torch.equal(row.tokens, other.tokens)
        assert torch.equal(row.labels, other.labels)
        first, second = row.targets, other.targets
        order, same = first.ids.argsort(-1), second.ids.argsort(-1)
        assert torch.equal(first.ids.gather(-1, order), second.ids.gather(-1, same))
        for name in ("logprobs", "log_partition", "log_tail", "entropy", "label_logprob"):
            x, y = getattr(first, name), getattr(second, name)
            if name == "logprobs":
                x, y = x.gather(-1, order), y.gather(-1, same)
            torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.slow
def test_two_processes_hold_one_teacher(teacher: Path, corpus: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    (summary,) = dumped(2, teacher, corpus, out)  # of two processes, one writes and one prints
    assert summary["complete"] and summary["worker"] == "0/1"
    assert verify_cache(out).ok
    require_same_targets(cache, out)
    commits = [json.loads(path.read_text()) for path in (out / "commits").iterdir()]
    assert all(commit["compute"]["tensor_parallel"] == 2 for commit in commits)
    (out / "seal.arrow").unlink()
    (out / "commits" / "00001.json").unlink()
    (again,) = dumped(2, teacher, corpus, out)  # both see what is committed
    assert again["complete"] and again["shards"]["by_this_worker"] == 1  # type: ignore[index]


@pytest.mark.slow
def test_four_processes_are_two_workers(teacher: Path, corpus: Path, cache: Path, tmp_path: Path) -> None:
    summaries = dumped(4, teacher, corpus, tmp_path / "c", "--no-tile-head")
    assert sorted(str(summary["worker"]) for summary in summaries) == ["0/2", "1/2"]
    assert verify_cache(tmp_path / "c").ok
    require_same_targets(cache, tmp_path / "c")


def test_groups_are_counted_and_not_ranks() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8"}
    assert find_worker(None, environment, 2) == Worker(2, 4)
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert find_worker(None, {**environment, **array}, 4) == Worker(3, 6)
    with pytest.raises(ConfigError, match="tensor_parallel is 3, but the number of processes is 8"):
        find_worker(None, environment, 3)


def test_what_tensor_parallel_needs(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = dump_options(teacher, corpus, tmp_path / "c", tensor_parallel=2)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 --no-python kdcache"):
        dump(config)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ConfigError, match=r"^device_map and tensor_parallel exclude each other"):
        dump_options(teacher, corpus, tmp_path / "c", tensor_parallel=2, device_map="auto")
    fields = {name: getattr(config, name) for name in DumpConfig.__dataclass_fields__}
    with pytest.raises(ConfigError, match="tensor_parallel is 2, for which the engine transformers needs the ranks"):
        DumpOptions(**fields, launch="local")
