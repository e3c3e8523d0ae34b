"""Figures of students side by side, against dense oracles; one walk, one forward pass of each model a batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.errors import ConfigError
from kdcache.report.evaluate import compare, evaluate, paired_difference, write_evaluation
from kdcache.rows import IGNORE, position_ids
from kdcache.student import fused_head
from kdcache.teacher.dump import dump
from kdcache.teacher.opened_teacher import OpenedTeacher
from tests.making import dump_options


def shaken(model: Path, out: Path, amount: float, seed: int = 0) -> str:
    """A model near another: its weights times 1 + amount * noise."""
    generator, student = torch.Generator().manual_seed(seed), AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + amount * torch.randn(weight.shape, generator=generator))
    student.save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def students(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("students")
    return [shaken(teacher, folder / name, amount) for name, amount in (("near", 0.05), ("far", 0.4), ("mid", 0.15))]


def dense_positions(model: str, cache: Path, rows: list[int]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """By row: `[m, V]` probabilities in float64, and `[m]` labels; a forward pass a row."""
    found, network = [], AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for row in (open_cache(cache)[i] for i in rows):
        places = torch.from_numpy(position_ids(row.segments.numpy()))[None]
        with torch.no_grad():
            out = network(input_ids=row.tokens[None], position_ids=places, attention_mask=None, use_cache=False)
        mask = row.labels != IGNORE
        p = out.logits[0][mask][:, :320].double().softmax(-1)
        found.append((p.numpy(), row.labels[mask].numpy()))
    return found


def ece(p: NDArray[Any], labels: NDArray[Any]) -> float:
    confidence, right, total = p.max(-1), p.argmax(-1) == labels, 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_figures_are_their_definitions(cache: Path, teacher: Path, students: list[str]) -> None:
    rows = list(range(len(open_cache(cache))))
    figures = evaluate(students[2], str(cache), str(teacher), device="cpu", batch_rows=3)
    q, labels = (np.concatenate(x) for x in zip(*dense_positions(students[2], cache, rows), strict=True))
    p, _ = (np.concatenate(x) for x in zip(*dense_positions(str(teacher), cache, rows), strict=True))
    at = np.arange(len(labels)), labels
    expected = {
        "nll": -np.log(q[at]).mean(),
        "teacher_nll": -np.log(p[at]).mean(),
        "delta_nll": (np.log(p[at]) - np.log(q[at])).mean(),
        "ece": ece(q, labels),
        "teacher_ece": ece(p, labels),
        "acceptance": np.minimum(p, q).sum(-1).mean(),
        "dense_kl": (p * np.log(p / q)).sum(-1).mean(),
        "dense_top1_agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=2e-5), name
    assert figures["positions"] == len(labels) == sum(b["positions"] for b in figures["calibration"]["bins"])
    assert len(figures["calibration"]["bins"]) == len(figures["teacher_calibration"]["bins"]) == 15
    assert figures["acceptance_low"] < figures["acceptance"] < figures["acceptance_high"]


def test_students_side_by_side_are_each_alone_and_their_difference_is_paired(
    cache: Path, teacher: Path, students: list[str]
) -> None:
    count = len(open_cache(cache))
    rows = [i * count // 4 for i in range(4)]
    both = compare(students, str(cache), str(teacher), rows=4, device="cpu", batch_rows=3)["students"]
    assert list(both) == students
    for name in students:
        alone = evaluate(name, str(cache), str(teacher), rows=4, device="cpu", batch_rows=3)
        assert alone == {k: v for k, v in both[name].items() if not k.startswith("nll_difference")}
    assert both[students[0]]["nll_difference"] is None
    nll = [[-np.log(q[np.arange(len(y)), y]) for q, y in dense_positions(name, cache, rows)] for name in students[:2]]
    d = [far - near for near, far in zip(*nll, strict=True)]
    mean = np.concatenate(d).mean()
    spread = sum((x - mean).sum() ** 2 for x in d)
    error = math.sqrt(4 / 3 * spread) / sum(map(len, d))
    second = both[students[1]]
    assert second["nll_difference"] == pytest.approx(mean, abs=1e-5) and mean > 0.01
    assert second["nll_difference"] == pytest.approx(second["nll"] - both[students[0]]["nll"], abs=1e-9)
    assert second["nll_difference_standard_error"] == pytest.approx(error, rel=1e-3)


def test_the_standard_error_is_that_of_rows_whose_positions_agree() -> None:
    """300 draws of 60 rows, whose positions share a shift: the spread of the means is the error that is stated. The
    estimate of a standard deviation from 300 draws is off by 1 / sqrt(600) = 4 %, and so is tested at four times that;
    taking positions as independent would state less than half."""
    random = np.random.default_rng(0)
    means, errors, naive = [], [], []
    for _ in range(300):
        counts = random.integers(10, 40, 60)
        d = [0.1 + random.normal(0, 0.5) + random.normal(0, 0.5, n) for n in counts]
        mean, error = paired_difference([float(x.sum()) for x in d], [0.0] * 60, counts.tolist())
        means.append(mean)
        errors.append(error)
        naive.append(np.concatenate(d).std() / math.sqrt(counts.sum()))
    truth = np.std(means)
    assert np.mean(errors) == pytest.approx(truth, rel=0.16)
    assert np.mean(naive) < truth / 2
    assert np.mean(means) == pytest.approx(0.1, abs=4 * truth / math.sqrt(300))
    assert paired_difference([3.0], [1.0], [4]) == (0.5, None)


def test_one_forward_pass_of_each_model_a_batch(
    cache: Path, teacher: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    inner = fused_head.packed_forward

    def count(model: Any, tokens: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if tokens.shape[1] == 64:  # a batch of rows, and no check of the head
            calls.append(model)
        return inner(model, tokens, *rest, **more)

    monkeypatch.setattr(fused_head, "packed_forward", count)
    asked = []
    logits = OpenedTeacher.logits
    monkeypatch.setattr(OpenedTeacher, "logits", lambda self, rows: asked.append(len(rows)) or logits(self, rows))
    compare(students, str(cache), str(teacher), rows=5, device="cpu", batch_rows=2)
    assert len(calls) == 3 * 3 and len(set(map(id, calls))) == 3  # three batches of three students
    assert asked == [2, 2, 1]


def test_students_named_twice_and_records_that_exist_are_refused(
    cache: Path, students: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is named twice"):
        compare([students[0], students[0]], str(cache))
    (tmp_path / "e.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_evaluation(str(tmp_path / "e.json"), {"cache": str(cache), "device": "cpu"}, {})
    assert (tmp_path / "e.json").read_text() == "mine"


@pytest.mark.assets
@pytest.mark.parametrize("select", ["topk", "full", "ipps"])
def test_acceptance_of_a_real_teacher_from_its_cache_and_live(assets: Path, tmp_path: Path, select: str) -> None:
    teacher, texts = assets / "models/stories260K", tmp_path / "t.jsonl"
    stories = (assets / "text/tinystories.txt").read_text().split("\n\n")[:25]
    texts.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    dump(
        dump_options(
            teacher, texts, tmp_path / "c", select=select, seq_len=128, **({} if select == "full" else {"k": 12})
        )
    )
    student = shaken(teacher, tmp_path / "s", 0.1)
    stored = evaluate(student, str(tmp_path / "c"), device="cpu")
    live = evaluate(student, str(tmp_path / "c"), str(teacher), device="cpu")
    assert 0.3 < live["acceptance"] < 0.9
    low, high = stored["acceptance_low"], stored["acceptance_high"]
    assert (live["acceptance_low"], live["acceptance_high"]) == (low, high)
    if select == "ipps":
        assert stored["acceptance"] is low is high is None
    elif select == "full":
        assert stored["acceptance"] == low == high == pytest.approx(live["acceptance"], abs=1e-5)
        assert stored["top1_agreement"] == pytest.approx(live["dense_top1_agreement"], abs=1e-3)
    else:
        assert stored["acceptance"] is None
        assert low + 1e-3 < live["acceptance"] < high - 1e-5
        assert high - low < 0.2
