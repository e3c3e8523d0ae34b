"""A second opinion: its KL against a dense one, and against what `evaluate` measures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import Selection, open_cache, select
from kdcache.errors import ConfigError, KdcacheError
from kdcache.explorer.compared import coarse_kl, open_compared
from kdcache.explorer.explorer import Explorer
from tests.explorer.unpacking import ratios, unpack
from tests.making import dump_options, make_model, make_tokenizer

VOCAB = 120


def test_the_kl_of_two_targets_bounds_the_dense_one() -> None:
    random = torch.Generator().manual_seed(1)
    one, other = (6 * torch.randn(50, VOCAB, generator=random) for _ in range(2))
    other = one + 0.3 * other
    log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    dense = (log_p.exp() * (log_p - log_q)).sum(-1)
    full = [select(logits, Selection("full")) for logits in (one, other)]
    torch.testing.assert_close(coarse_kl(*full, VOCAB), dense, rtol=1e-4, atol=1e-5)
    some = [select(logits, Selection("topk", k=k)) for logits, k in ((one, 9), (other, 14))]
    bound = coarse_kl(*some, VOCAB)
    assert (bound <= dense + 1e-5).all() and (bound > 0.5 * dense).float().mean() > 0.5
    torch.testing.assert_close(coarse_kl(some[0], some[0], VOCAB), torch.zeros(50).double(), atol=1e-6, rtol=0)
    mixed = coarse_kl(full[0], some[1], VOCAB)  # of one that keeps everything
    assert (mixed <= dense + 1e-5).all()


def test_of_a_sampled_target_there_is_none() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    sampled, kept = select(logits, Selection("ipps", k=4)), select(logits, Selection("topk", k=4))
    assert coarse_kl(sampled, kept, VOCAB).isnan().all() and coarse_kl(kept, sampled, VOCAB).isnan().all()
    silent = kept[torch.arange(5)]
    silent.count[2] = 0
    assert coarse_kl(kept, silent, VOCAB).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.slow
def test_a_student_position_by_position(cache: Path, teacher: Path, tmp_path: Path) -> None:
    from kdcache.report.evaluate import evaluate

    make_tokenizer(tmp_path / "s")
    make_model(tmp_path / "s", num_hidden_layers=1)
    figures = evaluate(str(tmp_path / "s"), str(cache), device="cpu")
    explorer = Explorer(str(cache), compare=str(tmp_path / "s"), device="cpu")
    head = explorer.head(explorer.rows[:1])
    assert head["compare"]["what"] == "student" and head["compare"]["kl_kind"] == figures["kl_kind"] == "lower-bound"
    kl = []
    for index in explorer.rows:
        payload = explorer.packed_row(index)
        own, other = unpack(payload["own"]), unpack(payload["other"])
        assert (own["slots"] == other["slots"]).all()
        kl.append(ratios(other["kl"]))
    assert np.concatenate(kl).mean() == pytest.approx(figures["kl"], abs=1e-3)
    same = Explorer(str(cache), compare=str(teacher), device="cpu")  # the teacher is its own best student
    payload = same.packed_row(0)
    assert np.abs(ratios(unpack(payload["other"])["kl"])).max() < 2e-3


@pytest.mark.slow
def test_the_cache_of_another_teacher(cache: Path, corpus: Path, tmp_path: Path) -> None:
    from kdcache.teacher.dump import dump

    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t", scale=4)
    dump(dump_options(tmp_path / "t", corpus, tmp_path / "c", k=5))
    explorer = Explorer(str(cache), compare=str(tmp_path / "c"))
    payload = explorer.packed_row(3)
    other = unpack(payload["other"])
    assert (other["count"] == 5).all() and (ratios(other["kl"]) > 0).any()
    dump(dump_options(tmp_path / "t", corpus, tmp_path / "long", k=5, seq_len=48))
    with pytest.raises(ConfigError, match=r"cannot be compared: they differ in seq_len \(64 and 48\)"):
        Explorer(str(cache), compare=str(tmp_path / "long"))
    text = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "others.jsonl").write_text("".join(reversed(text)))
    dump(dump_options(tmp_path / "t", tmp_path / "others.jsonl", tmp_path / "others", k=5))
    with pytest.raises(ConfigError, match="holds other tokens in"):
        Explorer(str(cache), compare=str(tmp_path / "others")).row(0)


def test_what_is_neither_cache_nor_student(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="student"):
        open_compared(str(tmp_path / "nothing"), open_cache(cache), 8, "cpu")
    shutil.copytree(cache, tmp_path / "copy")
    assert open_compared(str(tmp_path / "copy"), open_cache(cache), 8, "cpu").what == "cache"
