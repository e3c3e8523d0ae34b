"""Students of a cache with a row for each document: any causal model learns from it, and padding costs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import open_cache
from kdcache.errors import ConfigError, IsolationError
from kdcache.isolation import packed_forward
from kdcache.losses import Objective
from kdcache.prepared_mask import has_prepared_masks
from kdcache.rows import IGNORE
from kdcache.student.caches import open_sources
from kdcache.student.config import TrainConfig
from kdcache.student.data import batches
from kdcache.student.fused_head import compute_loss, count_items, fuse_head
from kdcache.student.model import load_student
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import ODD, dump_options, make_odd

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def single(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "c"
    assert dump(dump_options(teacher, corpus, out, pack="none", seq_len=128))["complete"]
    return out


def gradients(model: Any, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ODD)
def test_a_padded_batch_is_its_rows_one_by_one(single: Path, tmp_path: Path, kind: str) -> None:
    cache = open_cache(single)
    model = load_student(str(make_odd(tmp_path / kind, kind)), cache, CPU, seed=0)
    assert not has_prepared_masks(model)
    head, rows = fuse_head(model, CPU), [0, 20, 29, 31]
    lengths = [len(cache.read_packed(number)[0].tokens) for number in rows]
    assert len(set(lengths)) > 2
    (batch,) = batches(cache, rows, 4)
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (4, max(lengths))
    assert max(lengths) < cache.manifest.seq_len
    for length, labels, positions in zip(lengths, batch["labels"], batch["position_ids"], strict=True):
        assert (labels[length - 1 :] == IGNORE).all() and (labels[: length - 1] != IGNORE).all()
        assert positions.tolist() == list(range(max(lengths)))
    objective, items = Objective(loss="forward-kl", soft_weight=0.7), count_items(batch)

    def loss(each: Any) -> torch.Tensor:
        return compute_loss(model, head, each, objective, vocab_size=320, num_items=items)

    together = gradients(model, [loss(batch)])
    apart = gradients(model, [loss(each) for each in batches(cache, rows, 1)])
    assert together.keys() == apart.keys() and len(together) > 8
    size = max(values.abs().max().item() for values in apart.values())
    for name, values in apart.items():
        torch.testing.assert_close(together[name], values, atol=2e-5 * size, rtol=0)


def test_a_student_that_cannot_be_packed_trains(single: Path, tmp_path: Path) -> None:
    student = make_odd(tmp_path / "lfm2", "lfm2")
    config = TrainConfig(
        cache=str(single), student=str(student), out=str(tmp_path / "s"), steps=6, batch_rows=4, lr=5e-3, device="cpu",
        heldout=0.1,
    )  # fmt: skip
    measured = train(config)["heldout"]
    assert measured["after"]["kl"] < measured["before"]["kl"]
    assert np.isfinite(measured["after"]["nll"])


def test_a_student_of_packed_rows_gets_masks_or_is_told_the_way(cache: Path, tmp_path: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(make_odd(tmp_path / "gpt_oss", "gpt_oss")), opened, CPU, seed=0)
    assert has_prepared_masks(model)
    (batch,) = batches(opened, [0, 1], 2)
    head = fuse_head(model.train(), CPU)
    loss = compute_loss(model, head, batch, Objective(), vocab_size=320)
    assert all(values.isfinite().all() for values in gradients(model, [loss]).values())
    embedded: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: embedded.append(out))
    logits = packed_forward(model, batch["input_ids"], batch["position_ids"]).logits
    handle.remove()
    last = int(opened[0].segments.max())
    here = opened[0].segments == last
    (gradient,) = torch.autograd.grad(logits[0, here].square().sum(), embedded)
    assert last > 1 and (gradient[0, here].abs().sum(-1) > 0).all()
    assert not gradient[0, ~here].any() and not gradient[1].any()
    with pytest.raises(IsolationError, match=r'dumped with pack="none", where each document has a row of its own'):
        load_student(str(make_odd(tmp_path / "lfm2", "lfm2")), opened, CPU, seed=0)


def test_rows_of_both_kinds_cannot_be_mixed(
    single: Path, cache: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "c", seq_len=128))
    config = TrainConfig(
        cache=(str(single), str(tmp_path / "c")), student="s", out=str(tmp_path / "o"), steps=1, device="cpu"
    )
    with pytest.raises(ConfigError, match=r"cannot be mixed: they differ in pack \(none and best-fit\)"):
        open_sources(config)
