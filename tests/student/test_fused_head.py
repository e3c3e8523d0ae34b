"""The fused head: the loss and gradients of a model's own logits, whatever it does to them, and no [positions, V].

The loss of a batch in pieces is that of the whole, each term by its own positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache import Selection, open_cache, select, sparse_kd_loss_from_logits
from kdcache.errors import ModelError
from kdcache.isolation import packed_forward
from kdcache.losses import Figures, Objective, PositionWeights, distil
from kdcache.losses.fused_linear import TILE_ELEMENTS
from kdcache.student import Collator, RowDataset, compute_loss, count_items, labelled, load_student
from kdcache.student.fused_head import FusedHead, fuse_head

VOCAB, PADDED, ROWS, LENGTH = 100, 112, 3, 24
SMALL: dict[str, Any] = {
    "vocab_size": PADDED, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any], FusedHead]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, FusedHead()),
    "tied": ("llama", {"tie_word_embeddings": True}, FusedHead()),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}, FusedHead()),
    "bias": ("phi", {}, FusedHead()),
    "soft cap": ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}, FusedHead(1.0, 5.0)),
    "multiplied": ("cohere", {"logit_scale": 0.25}, FusedHead(0.25)),
    "divided": ("granite", {"logits_scaling": 8.0}, FusedHead(0.125)),
    "no name": ("llama", {"logit_scale": 7.0}, FusedHead()),
    "before the head": ("modernbert-decoder", {"num_hidden_layers": 3}, FusedHead()),
}


def make(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    name, options, _ = KINDS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **options, **changes}))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()  # no dropout


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    labels[:, ::5] = -100
    return tokens, positions, labels, 3 * torch.randn(int((labels != -100).sum()), VOCAB, generator=g)


def on_head(head: FusedHead, labels: Tensor, teacher: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    mask = labels != -100
    targets = select(teacher, Selection(k=8), temperatures=(1.0, 2.0))
    objective = Objective(temperature=2.0, soft_weight=0.7)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return distil(head.source(hidden[mask], weight, bias, VOCAB), targets, labels[mask], objective)

    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_the_models_own_logits(kind: str) -> None:
    model = make(kind)
    tokens, positions, labels, teacher = batch()
    mask = labels != -100
    own = packed_forward(model, tokens, positions).logits
    exact = sparse_kd_loss_from_logits(
        own[mask][:, :VOCAB], select(teacher, Selection(k=8), temperatures=(1.0, 2.0)),
        labels=labels[mask], temperature=2.0, soft_weight=0.7,
    )  # fmt: skip
    exact.backward()
    true = gradients(model)

    head = fuse_head(model, "cpu")
    assert head.scale == pytest.approx(KINDS[kind][2].scale) and head.softcap == KINDS[kind][2].softcap
    loss = packed_forward(model, tokens, positions, on_head=on_head(head, labels, teacher))
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    mine = gradients(model)
    assert mine.keys() == true.keys()
    for name in true:
        assert (mine[name] - true[name]).abs().max() <= 2e-5 * true[name].abs().max() + 1e-8, name
    assert torch.equal(packed_forward(model, tokens, positions).logits, own)  # and without a loss it is what it was


def test_a_cap_is_found_though_fresh_weights_never_reach_it() -> None:
    model = make("soft cap", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert fuse_head(model, "cpu").softcap == 30.0


def test_what_is_not_known_is_refused() -> None:
    model = make("llama")
    inner = model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    model.forward = odd
    with pytest.raises(ModelError, match="LlamaForCausalLM does something to its logits that is not known here"):
        fuse_head(model, "cpu")
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no linear output head, which its loss needs \(Sequential\)"
    ):
        fuse_head(model, "cpu")


class Largest(TorchDispatchMode):
    """The most numbers that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_as_large_as_positions_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 0)
    monkeypatch.setattr("kdcache.losses.fused_linear.LEAST_POSITIONS", 16)
    model = make("tied")
    tokens, positions, labels, teacher = batch()
    loss = on_head(fuse_head(model, "cpu"), labels, teacher)
    with Largest() as fused:
        packed_forward(model, tokens, positions, on_head=loss).backward()
    with Largest() as plain:
        packed_forward(model, tokens, positions).logits.sum().backward()
    weight = model.get_output_embeddings().weight
    assert plain.elements >= ROWS * LENGTH * PADDED > fused.elements
    assert fused.elements <= max(weight.numel(), 16 * VOCAB)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its tracing
def test_in_a_compiled_model() -> None:
    model = make("soft cap")
    tokens, positions, labels, teacher = batch()
    loss = on_head(fuse_head(model, "cpu"), labels, teacher)
    plain = packed_forward(model, tokens, positions, on_head=loss)
    plain.backward()
    true = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    found = packed_forward(compiled, tokens, positions, on_head=loss)
    found.backward()
    assert found.item() == pytest.approx(plain.item(), rel=5e-6)
    mine = gradients(model)
    for name in true:
        torch.testing.assert_close(mine[name], true[name], atol=2e-7, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # its new name is younger
def test_under_gradient_checkpointing() -> None:
    model = make("tied")
    tokens, positions, labels, teacher = batch()
    loss = on_head(fuse_head(model, "cpu"), labels, teacher)
    packed_forward(model, tokens, positions, on_head=loss).backward()
    true = gradients(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed_forward(model, tokens, positions, on_head=loss).backward()
    mine = gradients(model)
    for name in true:
        torch.testing.assert_close(mine[name], true[name], atol=1e-7, rtol=1e-5)


CACHED = 320
"""The vocabulary of the cache of these tests."""


def some_without_target(batch: dict[str, Any]) -> dict[str, Any]:
    targets = batch["targets"]
    kept = batch["labels"][labelled(batch)] % 3 > 0
    return {**batch, "targets": dataclasses.replace(targets, count=targets.count * kept)}


def test_pieces_make_the_whole(cache: Path, student_config: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    collate, rows = Collator([opened]), RowDataset([opened], [range(8)]).__getitems__(range(8))
    whole, *pieces = (some_without_target(collate(part)) for part in (rows, rows[:2], rows[2:]))
    items = count_items(whole)
    assert torch.equal(items, sum(count_items(piece) for piece in pieces))
    assert items[0] == labelled(whole).sum() > items[1] > 0
    objective, weights = Objective(soft_weight=0.7, temperature=2.0), PositionWeights("confidence")

    mask = labelled(whole)
    logits = packed_forward(model, whole["input_ids"], whole["position_ids"]).logits[mask][:, :CACHED].double()
    oracle = sparse_kd_loss_from_logits(
        logits, whole["targets"], labels=whole["labels"][mask], soft_weight=0.7, temperature=2.0,
        num_items=items[0], num_targets=items[1], position_weights=weights.of(whole["targets"], CACHED),
    ).item()  # fmt: skip

    head = fuse_head(model, "cpu")

    def loss(batch: dict[str, Any], num_items: torch.Tensor | None = None) -> float:
        return compute_loss(
            model, head, batch, objective, vocab_size=CACHED, num_items=num_items, weights=weights
        ).item()

    assert loss(whole) == pytest.approx(oracle, rel=5e-6)
    assert loss(whole, items) == pytest.approx(oracle, rel=5e-6)
    assert sum(loss(piece, items) for piece in pieces) == pytest.approx(oracle, rel=5e-6)
    assert sum(loss(piece) for piece in pieces) / 2 != pytest.approx(oracle, rel=3e-5)


def test_a_step_without_any_target_has_a_finite_loss(cache: Path, student_config: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    batch = Collator([opened])([RowDataset([opened], [range(1)])[0]])
    batch["targets"] = dataclasses.replace(batch["targets"], count=torch.zeros_like(batch["targets"].count))
    figures = Figures()
    loss = compute_loss(
        model, fuse_head(model, "cpu"), batch, Objective(soft_weight=0.5), vocab_size=CACHED,
        num_items=count_items(batch), figures=figures,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.5 * figures.values()["nll"].mean().item(), rel=5e-6)
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
