"""Entries that somebody else computed: what they become, what is refused, and a cache that knows no more."""

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

from kdcache import Selection, SparseTargets, open_cache, select, sparse_kd_loss_from_logits
from kdcache.codec import Layout, make_codec
from kdcache.errors import ConfigError, TargetError
from kdcache.known import Known
from kdcache.store.local import LocalStorage
from kdcache.store.publish import TOKENIZER, new_shard, publish_manifest, publish_shard

KNOWN = Known(entropy=False, label_logprob=False, partitions=(1.0,), tails=(1.0,), tail_sum="remainder")
PRECISIONS = ("float32", "float16", "4", "6", "12", "16")


def shuffled(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their float32 log-probabilities, in no order."""
    logprobs, ids = logits.double().log_softmax(-1).topk(k)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)).argsort(-1)
    return ids.gather(-1, order), logprobs.gather(-1, order).float()


def test_it_is_what_a_selection_would_have_made() -> None:
    logits = torch.cat([3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 300)])
    ids, logprobs = shuffled(logits[:40], 12)
    found, expected = SparseTargets.from_topk(ids, logprobs), select(logits[:40], Selection(k=12))
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.count, expected.count)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.log_tail, expected.log_tail, atol=1e-5, rtol=0)
    assert found.kind == "topk" and found.temperatures == (1.0,) and not found.log_partition.any()
    assert found.entropy is None and found.label_logprob is None and not found.sampled
    log_p, tail = found.at_temperature(1.0)
    assert torch.equal(log_p, found.logprobs) and found.log_tail is not None and torch.equal(tail, found.log_tail[:, 0])
    with pytest.raises(TargetError, match="temperature 2 is not exact"):
        found.at_temperature(2.0)
    two = SparseTargets.from_topk(
        ids.view(2, 20, 12), logprobs.view(2, 20, 12), label_logprob=torch.full((2, 20), -1.0)
    )
    assert two.count.shape == (2, 20) and torch.equal(two.ids.view(40, 12), found.ids)


def test_the_tail_is_one_minus_the_kept_mass_in_float64() -> None:
    for kept, tail in ((1 - 1e-5, 1e-5), (0.5, 0.5), (1.0, 0.0), (1.0 + 2e-7, 0.0)):
        logprob = torch.tensor([[math.log(kept)]], dtype=torch.float64)
        found = SparseTargets.from_topk(torch.tensor([[3]]), logprob).log_tail
        assert found is not None and float(found.exp()) == pytest.approx(tail, abs=1e-12, rel=1e-5)


NAN, BELOW = float("nan"), float("-inf")


@pytest.mark.parametrize(
    ("ids", "logprobs", "label", "words"),
    [
        ([[1, 2]], [[-1.0]], None, "are not entries"),
        ([[1.0, 2.0]], [[-1.0, -2.0]], None, "are not entries"),
        ([[]], [[]], None, "are not entries"),
        ([[1, 2]], [[-1.0, NAN]], None, "is not finite, or is above 0"),
        ([[1, 2]], [[-1.0, BELOW]], None, "is not finite, or is above 0"),
        ([[1, 2]], [[-1.0, 0.1]], None, "is not finite, or is above 0"),
        ([[1, 1]], [[-1.0, -2.0]], None, "names an id twice"),
        ([[1, -1]], [[-1.0, -2.0]], None, "or a negative one"),
        ([[1, 2]], [[-0.1, -0.2]], None, "a mass of 1.72"),
        ([[1, 2]], [[-1.0, -2.0]], [-1.0, -2.0], "label_logprob is not one"),
        ([[1, 2]], [[-1.0, -2.0]], [0.5], "label_logprob is not one"),
        ([[1, 2]], [[-1.0, -2.0]], [NAN], "label_logprob is not one"),
    ],
)
def test_bad_entries(ids: Any, logprobs: Any, label: Any, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        SparseTargets.from_topk(
            torch.tensor(ids), torch.tensor(logprobs), label_logprob=None if label is None else torch.tensor(label)
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("labelled", (False, True))
def test_every_codec_stores_them(precision: str, labelled: bool) -> None:
    logits = 4 * torch.randn(60, 400, generator=torch.Generator().manual_seed(3))
    logits[0] = -200.0
    logits[0, 5] = 0.0  # its kept mass reaches 1
    labels = torch.linspace(-9, 0, 60) if labelled else None
    whole = SparseTargets.from_topk(*shuffled(logits, 10), label_logprob=labels)
    known = dataclasses.replace(KNOWN, label_logprob=labelled)
    codec = make_codec(Layout.of(Selection(k=10), 400, (1.0,), known), precision)
    again = codec.decode(codec.encode(whole), 60)
    assert again.entropy is None and (again.label_logprob is not None) == labelled
    dense, expected = (torch.zeros(60, 400).scatter_(-1, t.ids.long(), t.weights) for t in (again, whole))
    slack = {"float32": 0.0, "float16": 1e-3, "4": 0.1, "6": 0.03, "12": 3e-3, "16": 2e-3}[
        precision
    ]  # log-odds of the tail are off by 1/128
    assert ((dense - expected).abs().sum(-1) <= slack + 1e-7).all()
    assert again.log_tail is not None and bool(torch.isneginf(again.log_tail[0]).all())


@pytest.fixture(scope="module")
def ready_made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a cache, with targets of entries alone."""
    whole, folder = open_cache(cache), tmp_path_factory.mktemp("topk") / "c"
    storage = LocalStorage(folder)
    manifest = dataclasses.replace(whole.manifest, temperatures=(1.0,), known=KNOWN, precision="6")
    manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    files = {name: whole.storage.read(f"{TOKENIZER}/{name}", 1 << 30) for name in manifest.tokenizer_files}
    manifest = publish_manifest(storage, manifest, files)
    for shard, commit in whole.commits.items():
        with new_shard(storage, manifest, shard) as writer:
            for row in range(commit.rows):
                packed, targets = whole.shard(shard).read(row)
                writer.write(packed, SparseTargets.from_topk(targets.ids, targets.logprobs))
            publish_shard(storage, manifest, writer, documents=commit.documents, entropies=None, compute=commit.compute)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_cache_of_them_shows_what_it_does_not_know(ready_made: Path) -> None:
    assert open_cache(ready_made).known == KNOWN
    assert json.loads(run("verify", ready_made, "--json").stdout)["ok"]
    summary = json.loads(run("inspect-shard", ready_made, "--json").stdout)
    assert summary["mean_entropy"] is summary["teacher_nll"] is summary["entropy_quantiles"] is None
    assert summary["known"] == KNOWN.to_fields() and 0 < summary["mean_tail"] < 1
    at = json.loads(run("inspect-shard", ready_made, "--row", 0, "--position", 2, "--json").stdout)
    assert at["entropy"] is None and at["label"]["logprob"] is None and at["tail"] > 0
    for arguments in ((), ("--row", 0, "--position", 2)):
        assert "unknown" in run("inspect-shard", ready_made, *arguments).stdout
    assert run("inspect-shard", ready_made, "--row", 0).exit_code == 0


def test_a_student_learns_from_them(ready_made: Path, student_config: Path, tmp_path: Path) -> None:
    basic = ("--cache", ready_made, "--student", student_config, "--steps", 2, "--batch-rows", 2, "--device", "cpu")
    done = run("train-student", *basic, "--out", tmp_path / "s", "--json")
    assert done.exit_code == 0, done.stderr
    after = json.loads(done.stdout)["heldout"]["after"]
    assert math.isfinite(after["kl"]) and after["kl_kind"] == "lower-bound"
    assert after["teacher_nll"] is after["delta_nll"] is None
    seen = run("evaluate", "--student", tmp_path / "s", "--cache", ready_made, "--device", "cpu", "--json")
    assert json.loads(seen.stdout)["teacher_nll"] is None and json.loads(seen.stdout)["kl"] > 0
    shown = run("evaluate", "--student", tmp_path / "s", "--cache", ready_made, "--device", "cpu").stdout
    assert "unknown" in next(line for line in shown.splitlines() if line.startswith("teacher nll"))
    for given, words in (
        (("--where", "entropy<2"), "does not know the teacher's entropy, which the row filter entropy<2 needs"),
        (("--position-weights", "confidence"), "this cache does not know the teacher's entropy, which the rule of"),
    ):
        refused = run("train-student", *basic, "--out", tmp_path / "t", *given)
        assert refused.exit_code == 2 and words in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def test_losses_ask_what_is_known() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    targets = SparseTargets.from_topk(*shuffled(logits, 5))
    assert float(sparse_kd_loss_from_logits(torch.zeros(9, 50), targets)) > 0
    with pytest.raises(TargetError, match="this cache does not know the teacher's entropy, which the demo needs"):
        targets.require("entropy", "the demo")
    with pytest.raises(TargetError, match="cannot be joined"):
        SparseTargets.cat([targets, dataclasses.replace(targets, label_logprob=torch.zeros(9))])


def test_a_manifest_cannot_know_what_contradicts_it(ready_made: Path) -> None:
    manifest = open_cache(ready_made).manifest
    for changes, words in (
        (
            {"positions": "entropy>1"},
            "teacher's entropy, which the position filter entropy>1 needs",
        ),
        ({"temperatures": (1.0, 2.0)}, "know the partition at each of them"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(manifest, **changes).require_sound()  # type: ignore[arg-type]
    for fields in ({"entropy": True}, KNOWN.to_fields() | {"tails": []}, KNOWN.to_fields() | {"entropy": "no"}):
        with pytest.raises(ConfigError, match=r"known|tail_sum"):
            Known.from_fields(fields)
