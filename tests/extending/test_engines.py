"""An engine that knows only top-k at T = 1 works through every command; what it does not know is unknown or refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from kdcache import open_cache
from tests.examples.loading import EXAMPLES
from tests.extending.test_kinds import run
from tests.processes import kdcache

PLUGIN = EXAMPLES / "extending" / "top_server.py"
LOGPROBS = (3 * torch.randn(320, 320, generator=torch.Generator().manual_seed(3))).log_softmax(-1)
"""Those of the engine."""


@pytest.fixture(scope="module")
def served(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "c"
    done = dumped(teacher, corpus, out)
    assert done.returncode == 0, done.stderr
    return out


def dumped(teacher: Path, corpus: Path, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return kdcache(
        "dump-teacher", "--plugin", PLUGIN, "--engine", "top-server", "--teacher", teacher, "--corpus", corpus,
        "--out", out, "--seq-len", 64, "--k", 8, "--precision", "float32", *options,
    )  # fmt: skip


def test_its_cache_through_every_command(teacher: Path, served: Path, student_config: Path, tmp_path: Path) -> None:
    summary = run("inspect-shard", served)
    assert summary["positions"] > 5000 and summary["mean_entropy"] is None and summary["entropy_quantiles"] is None
    assert 0 < summary["mean_tail"] < 1
    assert run("verify", served)["ok"]
    again = run("verify", served, "--teacher", teacher, "--engine", "top-server", "--rows", 3, "--plugin", PLUGIN)
    assert again["faithfulness"]["agrees"] and "entropy" not in again["faithfulness"]["stored"]
    at = run("inspect-shard", served, "--row", 0, "--position", 3)
    assert at["entropy"] is None and at["label"]["logprob"] is None and len(at["entries"]) == 8
    trained = run(
        "train-student", "--cache", served, "--student", student_config, "--out", tmp_path / "s", "--steps", 2,
        "--batch-rows", 2, "--device", "cpu",
    )  # fmt: skip
    after = trained["heldout"]["after"]
    assert after["kl"] > 0 and after["teacher_nll"] is None and after["delta_nll"] is None
    assert run("convert", served, "--out", tmp_path / "z", "--k", 4, "--store", "zarr")["complete"]
    assert run("verify", tmp_path / "z")["ok"]


def test_its_targets_are_what_it_gave(served: Path) -> None:
    cache = open_cache(served)
    assert cache.known.tail_sum == "remainder" and not cache.known.entropy and not cache.known.label_logprob
    assert cache.commits[0].compute["served_by"] == "nobody"
    row = cache[2]
    labelled = row.labels != -100
    wanted = LOGPROBS[row.tokens[labelled]].topk(8)
    assert (row.targets.ids[labelled].sort(-1).values == wanted.indices.sort(-1).values).all()
    tail = 1 - wanted.values.double().exp().sum(-1)
    assert row.targets.log_tail is not None
    torch.testing.assert_close(row.targets.log_tail[labelled][:, 0].double().exp(), tail, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--select", "ipps"), "selection ipps needs the whole vocabulary, which the engine top-server does not know"),
        (
            ("--temperatures", "1,2"),
            "temperature 2 needs the partition at that temperature, which the engine top-server",
        ),
        (("--positions", "entropy>1"), "entropy>1 needs the teacher's entropy, which the engine top-server does not"),
    ],
)
def test_what_it_does_not_know_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = dumped(teacher, corpus, tmp_path / "c", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "c").exists()
