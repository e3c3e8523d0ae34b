"""Training on rollouts: what the student wrote, with the log-probability of each token, scored by a teacher once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import ExtraSpec, Selection, create_cache, open_cache, select
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Objective
from kdcache.pretrained import fingerprint
from kdcache.student import compute_loss, fuse_head
from kdcache.student.config import TrainConfig
from kdcache.student.data import Collator, RowDataset, extra_of_labels
from kdcache.student.rollouts import require_writer
from kdcache.student.train import train
from tests.making import STUDENT

VOCAB, LENGTH, ROWS = 320, 24, 96
LOSS = "sampled-reverse-kl"


def make(folder: Path, seed: int, sharp: float) -> Any:
    """A random student of 384 ids; `sharp` scales its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **STUDENT)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """`[R, L, VOCAB]` float64."""
    logits: Tensor = model(tokens).logits[..., :VOCAB].double()
    return logits


def roll_out(model: Any) -> tuple[Tensor, Tensor]:
    """`[ROWS, LENGTH]` tokens that a model draws after a first one, and the log-probability of each."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, 1), generator=g)
    logps = torch.zeros(ROWS, 1, dtype=torch.float64)
    while tokens.shape[1] < LENGTH:
        log_q = logits_of(model, tokens)[:, -1].log_softmax(-1)
        drawn = torch.multinomial(log_q.exp(), 1, generator=g)
        tokens, logps = torch.cat([tokens, drawn], 1), torch.cat([logps, log_q.gather(-1, drawn)], 1)
    return tokens, logps


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`writer` and `teacher`, two models; `c`, a cache of what the first wrote, scored by the second."""
    root = tmp_path_factory.mktemp("rollouts")
    writer, teacher = make(root / "writer", 0, 6.0), make(root / "teacher", 1, 12.0)
    tokens, logps = roll_out(writer)
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    selection = Selection(k=4)
    for name, extras in (("c", {"writer_logp": ExtraSpec(width=1)}), ("plain", {})):
        cache = create_cache(
            root / name, vocab_size=VOCAB, seq_len=LENGTH, selection=selection, shards=2, teacher="teacher-1",
            extras=extras, precision="float32",
            origin={"generated": {"writer": "writer", "writer_sha256": fingerprint(root / "writer")}},
        )  # fmt: skip
        for number in range(2):
            with cache.shard(number) as shard:
                for i in range(number, ROWS, 2):
                    targets = select(logits_of(teacher, tokens[i : i + 1])[0].float(), selection, labels=labels[i])
                    given = {"writer_logp": logps[i][:, None].float()} if extras else None
                    shard.write(tokens[i], targets, extras=given)
        cache.finish()
    return root


def options(world: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "cache": str(world / "c"), "student": str(world / "writer"), "out": str(out), "loss": LOSS, "steps": 3,
        "batch_rows": 8, "lr": 2e-3, "heldout": 0.1, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**usual, **changes})


def batch_of(world: Path, rows: int = 6) -> dict[str, Any]:
    opened = open_cache(world / "c")
    return Collator([opened])([RowDataset([opened], [range(rows)])[i] for i in range(rows)])


def test_a_label_finds_what_its_writer_gave_it(world: Path) -> None:
    """The student is its writer still, so every ratio is 1; a slot to either side would show at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "writer").eval()
    batch = batch_of(world)
    labels = batch["labels"]
    log_q = logits_of(model, batch["input_ids"]).log_softmax(-1)[labels != -100]
    own = log_q.gather(-1, labels[labels != -100][:, None])[:, 0]
    torch.testing.assert_close(extra_of_labels(batch, "writer_logp").double(), own, atol=1e-5, rtol=0)
    loss = compute_loss(model, fuse_head(model, "cpu"), batch, Objective(loss=LOSS), vocab_size=VOCAB)
    exact = ((own - batch["targets"].label_logprob) ** 2 / 2).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def test_a_batch_without_them_is_refused(world: Path) -> None:
    batch = batch_of(world)
    with pytest.raises(TargetError, match="the batch has no other, one number a token"):
        extra_of_labels(batch, "other")
    batch["extras"]["writer_logp"][0, 5] = torch.nan
    with pytest.raises(TargetError, match="a token that is a label has no writer_logp"):
        extra_of_labels(batch, "writer_logp")


@pytest.mark.slow
def test_a_student_comes_nearer_to_the_teacher_where_it_goes_itself(world: Path, tmp_path: Path) -> None:
    """The dense reverse KL on its own rollouts, which the cache does not hold, falls."""
    from transformers import AutoModelForCausalLM

    train(options(world, tmp_path / "s", steps=90, batch_rows=16, lr=5e-3))
    teacher, before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (world / "teacher", world / "writer", tmp_path / "s")
    )

    def reverse_kl(model: Any) -> float:
        tokens, _ = roll_out(model)
        q, p = (logits_of(x, tokens).log_softmax(-1) for x in (model, teacher))
        return float((q.exp() * (q - p)).sum(-1).mean())

    assert reverse_kl(after) < 0.8 * reverse_kl(before)
    logged = json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] > 0
    described = json.loads((tmp_path / "s/train-student.json").read_text())
    assert described["teachers"] == [open_cache(world / "c").manifest.teacher_sha256]


def test_other_writers_and_teachers_are_refused_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"  # the same weights, distilled before
    shutil.copytree(world / "writer", again)
    (again / "train-student.json").write_text(json.dumps({"teachers": ["f" * 64]}))
    config = tmp_path / "config.json"
    shutil.copy(world / "writer/config.json", config)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"cache": str(world / "plain")}, "the cache has no writer_logp, the log-probability that the writer gave"),
        (
            {"student": str(world / "teacher")},
            r"the cache names writer \(sha256 \w{12}\) as their writer, not .*teacher",
        ),
        ({"student": str(config)}, "learns from rollouts of the student, but .*config.json has no weights yet"),
        ({"student": str(again)}, r"distilled from another teacher \(sha256 f{12}\) than the cache names \(\w{12}\)"),
    )
    for changes, words in cases:
        with pytest.raises(ConfigError, match=words):
            train(options(world, tmp_path / "s", **changes))
        assert not (tmp_path / "s").exists()


def test_rollouts_that_were_not_drawn_are_refused(world: Path) -> None:
    manifest = open_cache(world / "c").manifest
    generated = {**manifest.origin["generated"], "temperature": 0.0}
    with pytest.raises(ConfigError, match="the rollouts were written with temperature 0; generate them with another"):
        require_writer(
            dataclasses.replace(manifest, origin={**manifest.origin, "generated": generated}),
            str(world / "writer"),
            LOSS,
        )


@pytest.mark.slow
def test_a_student_of_the_same_teacher_is_none_of_them(world: Path, tmp_path: Path) -> None:
    """As a run leaves it: `train-student.json` names the teacher of this cache."""
    again = tmp_path / "again"
    shutil.copytree(world / "writer", again)
    same = open_cache(world / "c").manifest.teacher_sha256
    (again / "train-student.json").write_text(json.dumps({"teachers": [same]}))
    summary = train(options(world, tmp_path / "s", student=str(again), loss=f"{LOSS}*0.5+jsd"))
    assert summary["steps"] == 3
