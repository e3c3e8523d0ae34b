"""Students of another tokenizer: the ordinary path where it is the same one, and what a run says, saves and refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import open_cache
from kdcache.aligned_targets import AlignedTargets
from kdcache.alignment import AlignedRows, Alignment, aligned_rows, read_student_tokenizer
from kdcache.alignment.chunks import Chunks
from kdcache.errors import ConfigError, KdcacheError
from kdcache.losses import Objective
from kdcache.report.evaluate import evaluate
from kdcache.student.config import TrainConfig
from kdcache.student.data import batches
from kdcache.student.fused_head import compute_loss, fuse_head
from kdcache.student.model import load_student
from kdcache.student.train import train
from kdcache.targets import SparseTargets
from kdcache.teacher.dump import dump
from tests.corpus.tokenizers_of_kinds import make, permuted
from tests.making import STUDENT, TEXTS, dump_options, make_model, make_tokenizer

CPU = torch.device("cpu")


def aligned(cache: Path, folder: Path) -> AlignedRows:
    opened = open_cache(cache)
    return AlignedRows(opened, Alignment(opened, read_student_tokenizer("s", folder)))


def loss_of(model: Any, batch: dict[str, Any], vocab: int, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient in the embeddings."""
    model.zero_grad()
    loss = compute_loss(model, fuse_head(model, CPU), batch, objective, vocab_size=vocab)
    loss.backward()
    return loss.detach(), model.get_input_embeddings().weight.grad.clone()


@pytest.fixture(scope="module")
def byte_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of a student with a tokenizer of SentencePiece's kind beside it."""
    folder = tmp_path_factory.mktemp("other")
    make("llama2").save_pretrained(folder)
    fields = {**STUDENT, "vocab_size": 384, "max_position_embeddings": 512}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields})
    )
    return folder / "config.json"


@pytest.mark.parametrize("objective", [Objective(temperature=2.0, soft_weight=0.7), Objective(loss="gold*0.5+uld")])
def test_the_same_tokenizer_gives_the_bytes_and_losses_of_the_ordinary_path(
    cache: Path, tmp_path: Path, objective: Objective
) -> None:
    make_model(tmp_path, **STUDENT)
    tokenizer = make_tokenizer(tmp_path)
    rows, numbers = aligned(cache, tmp_path), [0, 3, 7]
    assert rows.row_spec == rows.cache.row_spec and rows.alignment.complete
    model = load_student(str(tmp_path), rows.cache, CPU, 0, alignment=rows.alignment)
    (mine,), (theirs,) = batches(rows, numbers, 3), batches(rows.cache, numbers, 3)
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(mine[name], theirs[name])
    for name in SparseTargets.__dataclass_fields__:
        one, other = getattr(mine["targets"], name), getattr(theirs["targets"], name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert isinstance(mine["targets"], AlignedTargets) and (mine["targets"].chunk_length == 1).all()
    for one, other in zip(loss_of(model, mine, 320, objective), loss_of(model, theirs, 320, objective), strict=True):
        assert torch.equal(one, other)

    other_folder = tmp_path / "permuted"  # the same student and tokenizer with other ids
    shutil.copytree(tmp_path, other_folder)
    student, new = permuted(tokenizer)
    student.save_pretrained(other_folder)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path)
    padded = torch.from_numpy(np.concatenate([new, np.arange(len(new), 384)]))
    with torch.no_grad():
        changed.get_input_embeddings().weight[padded] = model.get_input_embeddings().weight.clone()
    changed.save_pretrained(other_folder)
    rows = aligned(cache, other_folder)
    changed = load_student(str(other_folder), rows.cache, CPU, 0, alignment=rows.alignment)
    (batch,) = batches(rows, numbers, 3)
    assert torch.equal(batch["input_ids"][mine["labels"] != -100], padded[mine["input_ids"]][mine["labels"] != -100])
    wanted, gradient = loss_of(model, theirs, 320, objective)
    found, of_changed = loss_of(changed, batch, 320, objective)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(of_changed[padded], gradient, rtol=1e-3, atol=1e-5)


def test_rows_of_another_tokenizer_keep_their_pieces_and_their_text(cache: Path, byte_student: Path) -> None:
    rows = aligned(cache, byte_student.parent)
    own, theirs = rows.alignment.student.tokenizer, rows.cache.load_tokenizer()
    numbers, whole = range(8), 0
    rows = pickle.loads(pickle.dumps(rows))  # as readers are given it
    for (row, targets), (other, stored) in zip(rows.read_rows(numbers), rows.cache.read_rows(numbers), strict=True):
        assert row.piece_documents.tolist() == other.piece_documents.tolist()
        ends, others = np.cumsum(row.piece_lengths), np.cumsum(other.piece_lengths)
        for end, size, end_there, size_there in zip(ends, row.piece_lengths, others, other.piece_lengths, strict=True):
            text = theirs.decode(other.tokens[end_there - size_there : end_there], skip_special_tokens=True)
            assert own.decode(row.tokens[end - size : end], skip_special_tokens=True) == text
        assert len(targets.count) == int((row.labels(len(row.tokens)) != -100).sum())
        if (other.tokens[others - other.piece_lengths] == 0).all():  # each piece begins a document, with its <s>
            whole += 1  # then all of its text is in chunks, with the likelihood that the teacher gave it
            assert targets.chunk_bytes.sum() == targets.label_bytes.sum()
            assert targets.chunk_logprob.sum().item() == pytest.approx(stored.label_logprob.sum().item(), rel=1e-5)
        # Where a chunk begins, what is known of the teacher is what it said there.
        log_p, log_tail = targets.at_temperature(2.0)
        some = targets.has_target
        torch.testing.assert_close((log_p.exp().sum(-1) + log_tail.exp())[some], torch.ones(int(some.sum())))
    assert whole


def config(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"align": True, "steps": 2, "batch_rows": 2, "heldout": 0.2, "device": "cpu"}
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param("forward-kl", marks=pytest.mark.long), "gold*0.5+uld*0.5+alm"])
def test_a_run_reports_what_is_aligned_and_bits_per_byte(
    cache: Path, byte_student: Path, tmp_path: Path, loss: str
) -> None:
    summary = train(config(cache, byte_student, tmp_path, loss=loss, soft_weight=0.5))
    after = summary["heldout"]["after"]
    assert 0.9 < after["aligned_bytes"] <= 1.0 and after["tokens_per_chunk"] >= 1
    assert after["bits_per_byte"] > after["teacher_bits_per_byte"] > 0
    assert after["bits_per_byte"] < summary["heldout"]["before"]["bits_per_byte"]
    assert "aligned_bytes" in (tmp_path / "metrics.jsonl").read_text()
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own.get_vocab() == make("llama2").get_vocab()
    again = evaluate(str(tmp_path), str(cache), heldout=0.2, device="cpu", align=True)
    assert again["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-6)
    assert json.loads((tmp_path / "train-student.json").read_text())["caches"][0]["student_tokenizer"]


@pytest.mark.slow
@pytest.mark.long
def test_a_student_of_the_caches_tokenizer_has_bits_per_byte_too(
    cache: Path, student_config: Path, tmp_path: Path
) -> None:
    after = train(config(cache, student_config, tmp_path, align=False))["heldout"]["after"]
    texts = sum(len(text.encode()) for text in TEXTS)
    assert after["teacher_bits_per_byte"] > 0 and "aligned_bytes" not in after
    assert 0 < after["nll"] * after["positions"] / np.log(2) / after["bits_per_byte"] < texts


@pytest.mark.slow
def test_what_is_refused(
    cache: Path, teacher: Path, corpus: Path, student_config: Path, byte_student: Path, tmp_path: Path
) -> None:
    def refused(words: str, made_from: Path = cache, student: Path = byte_student, **changes: Any) -> None:
        with pytest.raises(KdcacheError, match=words):
            train(config(made_from, student, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()

    refused("align needs the tokenizer of the student", student=student_config)
    refused("needs each label among the teacher's ids", loss="decoupled-kl")
    with pytest.raises(ConfigError, match="align and pool exclude each other"):
        config(cache, byte_student, tmp_path / "out", pool=("x",))
    sampled = tmp_path / "sampled"
    dump(dump_options(teacher, corpus, sampled, select="sample", draws=4, k=None, temperatures="1"))
    refused(r"of sampled targets \(sample\) needs every token of the teacher", made_from=sampled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligned_rows, "chunks_of", lambda piece: Chunks.joined([]))
        refused("share no byte boundary inside a piece")
    short = tmp_path / "short"
    shutil.copytree(byte_student.parent, short)
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 16}))
    refused("tokens of the student in one context, which takes 16", student=short / "config.json")
