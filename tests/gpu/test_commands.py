"""Dumps and training on a device, beside the same on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.errors import KdcacheError
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model, make_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "sample": {"select": "sample", "draws": 20},
    "ipps": {"select": "ipps", "k": 8, "temperatures": "1"},
    "full": {"select": "full"},
}


def targets_of(path: Path) -> Any:
    """Tokens and targets of all labelled slots of a cache, in order."""
    rows = list(open_cache(path))
    tokens = torch.cat([row.tokens for row in rows])
    return tokens, type(rows[0].targets).cat([row.targets[row.labels != -100] for row in rows])


@pytest.mark.parametrize("tiled", [True, False], ids=["head in tiles", "head whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dump_is_that_of_a_cpu(
    kind: str, tiled: bool, device_of_commands: str, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """The same tokens, and the targets of float32 logits whose sums are cut otherwise. A batch is always ahead."""
    for name, where in (("here", "cpu"), ("there", device_of_commands)):
        done = dump(
            dump_options(teacher, corpus, tmp_path / name, device=where, batch_rows=2, tile_head=tiled, **KINDS[kind])
        )
        assert done["complete"]
    assert verify_cache(tmp_path / "there").ok
    (tokens, ours), (same_tokens, theirs) = (targets_of(tmp_path / name) for name in ("here", "there"))
    assert torch.equal(tokens, same_tokens)
    same = (ours.ids == theirs.ids).all(-1) & (ours.count == theirs.count)
    assert same.float().mean() > 0.98  # near ties, and points near the border of two ids
    for name in ("weights", "entropy", "label_logprob"):
        a, b = (getattr(targets, name)[same] for targets in (ours, theirs))
        torch.testing.assert_close(b, a, atol=2e-4, rtol=2e-4, equal_nan=True)


def test_a_dump_gives_the_same_bytes_again(
    device_of_commands: str, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Also in batches of which two are never in flight: one batch holds a whole shard."""
    sums = []
    for name, rows in (("a", 2), ("b", 2), ("c", 64)):
        assert dump(dump_options(teacher, corpus, tmp_path / name, device=device_of_commands, batch_rows=rows))[
            "complete"
        ]
        sums.append(verify_cache(tmp_path / name).content_sha256)
    assert sums[0] == sums[1]  # bits are promised for equal batches only
    (_, few), (_, many) = (targets_of(tmp_path / name) for name in ("a", "c"))
    same = (few.ids == many.ids).all(-1)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(few.logprobs[same], many.logprobs[same], atol=2e-4, rtol=2e-4)


def test_a_bfloat16_teacher_is_near_the_float32_one(
    device_of_commands: str, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Its own rounding is 2^-8 of a logit; what a target adds to it is nothing."""
    for name, dtype, where in (("exact", "float32", "cpu"), ("half", "bfloat16", device_of_commands)):
        dump(dump_options(teacher, corpus, tmp_path / name, device=where, dtype=dtype, select="full"))
    (_, exact), (_, half) = (targets_of(tmp_path / name) for name in ("exact", "half"))
    p, q = (t.logprobs.double().gather(-1, t.ids.long().argsort(-1)) for t in (exact, half))  # [N, V] by id
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.mean() < 1e-2 and kl.max() < 0.2
    assert torch.allclose(half.logprobs.double().exp().sum(-1), torch.ones(len(p), dtype=torch.float64), atol=1e-4)


def test_what_a_teacher_gives_that_is_not_finite_is_named(
    device_of_commands: str, corpus: Path, tmp_path: Path
) -> None:
    """With another batch in flight: the same document as on a CPU, and nothing of its shard is committed."""
    words = {}
    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "t/model.safetensors")
    weights["model.embed_tokens.weight"][200:260] = torch.nan
    save_file(weights, tmp_path / "t/model.safetensors", {"format": "pt"})
    for where in ("cpu", device_of_commands):
        with pytest.raises(KdcacheError, match="NaN or infinite") as caught:
            dump(dump_options(tmp_path / "t", corpus, tmp_path / f"c-{where}", device=where, batch_rows=2))
        words[where] = str(caught.value)
    assert len(set(words.values())) == 1


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 6, "batch_rows": 4, "accumulate": 2, "lr": 2e-3, "heldout": 0.1, "soft_weight": 0.8,
        "dtype": "float32", "temperature": 2.0,
    }  # fmt: skip
    return TrainConfig(cache=str(cache), student=str(student), out=str(out), **{**usual, **changes})


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_training_takes_the_steps_of_a_cpu(
    device_of_commands: str, cache: Path, student_config: Path, tmp_path: Path
) -> None:
    """Through the fused head, from pinned batches; six steps do not drift apart."""
    for name, where in (("here", "cpu"), ("there", device_of_commands)):
        train(options(cache, student_config, tmp_path / name, device=where))
    here, there = losses(tmp_path / "here"), losses(tmp_path / "there")
    assert there == pytest.approx(here, rel=1e-3) and here[-1] < here[0]
    after = [
        json.loads((tmp_path / name / "summary.json").read_text())["heldout"]["after"] for name in ("here", "there")
    ]
    for name in ("nll", "kl"):
        assert after[1][name] == pytest.approx(after[0][name], rel=1e-3), name


def test_training_in_bfloat16_with_readers_and_checkpointing(
    device_of_commands: str, cache: Path, student_config: Path, tmp_path: Path
) -> None:
    config = options(
        cache, student_config, tmp_path / "s", device=device_of_commands, dtype="bfloat16", steps=12, lr=5e-3,
        gradient_checkpointing=True,
    )  # fmt: skip
    summary = train(dataclasses.replace(config, readers=1 if device_of_commands == "cuda" else 0))
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["kl"] < before["kl"] and after["nll"] < before["nll"]
