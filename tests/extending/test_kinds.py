"""Kinds of selection that the package knows nothing of work through every command, and are registered once."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kdcache_cli.main import app
from typer.testing import CliRunner

from examples.extending.min_p import MinP
from kdcache import Selection, open_cache, select
from kdcache.errors import ConfigError
from kdcache.selection import kind_names, register_kind
from tests.extending.poisson import Poisson


def run(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--json")], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def min_p(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minp") / "c"
    run(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", out, "--seq-len", 64,
        "--temperatures", "1,2", "--device", "cpu", "--select", "minp", "--k", 12, "--set", "base=0.2",
    )  # fmt: skip
    return out


@pytest.mark.slow
def test_a_truncated_kind_through_every_command(min_p: Path, student_config: Path, tmp_path: Path) -> None:
    summary = run("inspect-shard", min_p)
    assert summary["selection"] == {"kind": "minp", "k": 12, "base": 0.2} and summary["mean_tail"] > 0
    at = run("inspect-shard", min_p, "--row", 0, "--position", 3)
    largest = at["entries"][0]["probability"]
    assert 1 <= at["kept"] <= 12 and all(e["probability"] >= 0.19 * largest for e in at["entries"])
    assert sum(e["probability"] for e in at["entries"]) + at["tail"] == pytest.approx(1, abs=1e-5) or at["kept"] > 10
    assert run("verify", min_p)["ok"]
    trained = run(
        "train-student", "--cache", min_p, "--student", student_config, "--out", tmp_path / "s", "--steps", 3,
        "--batch-rows", 2, "--device", "cpu", "--temperature", 2,
    )  # fmt: skip
    assert math.isfinite(trained["heldout"]["after"]["kl"]) and trained["heldout"]["after"]["teacher_nll"] > 0
    fewer = run("convert", min_p, "--out", tmp_path / "f", "--k", 3, "--store", "zarr")
    assert fewer["complete"] and run("verify", tmp_path / "f")["ok"]
    kept, few = open_cache(min_p), open_cache(tmp_path / "f")
    assert few.manifest.selection == {"kind": "minp", "k": 3, "base": 0.2}
    for i in range(3):
        whole, part = kept[i].targets, few[i].targets
        assert torch.equal(part.count, whole.count.clamp(max=3))


def test_what_it_keeps_is_what_it_says() -> None:
    logits = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = select(logits, Selection(kind="minp", k=20, base=0.3), temperatures=(1.0,))
    p = logits.float().double().softmax(-1)
    wanted = (p >= 0.3 * p.amax(-1, keepdim=True)).sum(-1).clamp(max=20)
    assert torch.equal(found.count, wanted)
    assert found.log_tail is not None
    mass = found.weights.double().sum(-1) + found.log_tail[:, 0].double().exp()
    torch.testing.assert_close(mass, torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_sampled_kind_without_bias_through_a_dump(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    logits = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    rule, n = Selection(kind="poisson", tau=0.05, vocabulary=30), 4000
    found = select(logits.expand(n, -1).contiguous(), rule, temperatures=(1.0,))
    mean = torch.zeros(n, 30).scatter_add_(-1, found.ids, found.weights).double().mean(0)
    p = logits.double().softmax(-1)[0]
    noise = (p * (0.05 - p).clamp(min=0) / n).sqrt()
    assert ((mean - p).abs() <= 5 * noise + 1e-6).all()
    out = tmp_path / "c"
    run(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", out, "--seq-len", 64, "--limit-docs", 20,
        "--device", "cpu", "--select", "poisson", "--set", "tau=0.02", "--set", "vocabulary=320",
    )  # fmt: skip
    assert run("verify", out)["ok"] and run("inspect-shard", out)["mean_tail"] is None
    manifest = json.loads((out / "kdcache.json").read_text())
    assert manifest["known"]["tails"] == [] and manifest["precision"] == "float32"
    targets = open_cache(out)[0].targets
    assert targets.sampled and float(targets.weights.sum(-1)[targets.count > 0].mean()) == pytest.approx(1, abs=0.1)


def test_a_kind_is_registered_once() -> None:
    assert kind_names()[-2:] == ("minp", "poisson") and isinstance(Selection(kind="minp", base=0.5), MinP)
    with pytest.raises(ConfigError, match="a kind named minp is registered already"):
        register_kind(MinP)
    with pytest.raises(ConfigError, match="must be a dataclass with a name"):
        register_kind(type("Nothing", (Poisson,), {"kind": 3}))
    bare = dataclasses.make_dataclass("Bare", [], bases=(Selection,), frozen=True, namespace={"kind": "bare"})
    with pytest.raises(ConfigError, match="kind bare does not define form"):
        register_kind(bare)


def test_settings_of_a_kind_are_checked() -> None:
    for settings, words in (
        ({}, "base is not given, but kind minp needs it"),
        ({"base": 0}, "base is 0, but must be above 0 and at most 1"),
        ({"base": "much"}, "base is much, but must be a number"),
        ({"base": 0.5, "draws": 3}, "draws is 3, but kind minp has no such setting"),
    ):
        with pytest.raises(ConfigError, match=words):
            Selection(kind="minp", **settings)
