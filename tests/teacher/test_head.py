"""The head in tiles says what the model says, holds no more than a tile, and leaves no trace in the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from kdcache import Selection, SparseTargets, open_cache
from kdcache.errors import LogitsError, ModelError
from kdcache.isolation import packed_forward
from kdcache.rows import PackedRow, RowSpec
from kdcache.selection import draws
from kdcache.teacher import opened_teacher
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import tiles
from kdcache.teacher.engines.base import HiddenStates, TargetRequest
from kdcache.teacher.engines.tiled_head import TiledHead, require_same_logits
from kdcache.teacher.engines.tiles import tile_slices
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher
from tests.making import TEACHER, dump_options
from tests.processes import PATIENCE

SHAPE = {**TEACHER, "head_dim": 8, "pad_token_id": 0}
GPT = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"vocab_size": 384, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 128, "word_embed_proj_dim": 16}  # fmt: skip
MPT = {"vocab_size": 384, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}

PLAIN: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen3": SHAPE,
    "gpt2": GPT,
    "gpt_neox": SHAPE,
    "mpt": MPT,
    "opt": OPT,  # its forward calls a part of the base model
    "mixtral": {**SHAPE, "num_local_experts": 4, "output_router_logits": True},
    "llama4_text": {**SHAPE, "num_local_experts": 2, "intermediate_size_mlp": 64},  # names no base model
}
MORE: dict[str, dict[str, Any]] = {  # these do more than multiply by a matrix
    "gemma2": {**SHAPE, "final_logit_softcapping": 0.5},
    "cohere": {**SHAPE, "logit_scale": 0.25},
    "granite": {**SHAPE, "logits_scaling": 3.0},
    "phi": SHAPE,  # a bias
    "modernbert-decoder": SHAPE,  # a transform before the head, and the head itself is called `decoder`
}


def build(kind: str, options: dict[str, Any], tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**options, "tie_word_embeddings": tied})
    config._experts_implementation = "eager"  # the fused one has no float64
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # born as zeros, which would hide that one is left out
                parameter.normal_()
    return model


def batch(rows: int = 3, slots: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions of two pieces a row, and about half of the slots."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 384, (rows, slots), generator=generator)
    positions = torch.cat([torch.arange(8), torch.arange(slots - 8)]).expand(rows, -1)
    return tokens, positions, (torch.rand(rows, slots, generator=generator) < 0.5).nonzero()


@torch.inference_mode()
def in_tiles(model: Any, tokens: Tensor, positions: Tensor, slots: Tensor) -> list[Tensor]:
    head = TiledHead(model, "cpu")
    given = HiddenStates(head.hidden(tokens, positions)[slots[:, 0], slots[:, 1]], head.logits)
    return [given.logits(part) for part in tile_slices(len(given), 384, torch.device("cpu"))]


@torch.inference_mode()
def in_one_piece(model: Any, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
    return packed_forward(model, tokens, positions).logits[slots[:, 0], slots[:, 1]]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 4 positions."""
    monkeypatch.setitem(tiles.TILE_LOGITS, "cpu", 4 * 384)
    monkeypatch.setattr(tiles, "_LEAST_POSITIONS", 1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [*PLAIN, *MORE])
def test_logits_in_tiles_are_the_models_own(kind: str, tied: bool) -> None:
    """They may be twice as far from the logits in float64 as the model's own in float32 are."""
    model, inputs = build(kind, {**PLAIN, **MORE}[kind], tied), batch()
    tiles, own = in_tiles(model, *inputs), in_one_piece(model, *inputs)
    hidden = TiledHead(model, "cpu").hidden(*inputs[:2])[inputs[2][:, 0], inputs[2][:, 1]].double()
    truth = in_one_piece(model.double(), *inputs)
    allowed = 2 * (own - truth).abs().max()
    assert len(tiles) > 5 and max(map(len, tiles)) <= 4
    assert (torch.cat(tiles) - truth).abs().max() <= allowed
    assert (own - truth.roll(1, 0)).abs().max() > 1000 * allowed  # the order of positions matters
    if kind in MORE:  # and so does what a bare product leaves out
        assert (hidden @ model.get_output_embeddings().weight.T - truth).abs().max() > 1000 * allowed


def test_tiles_of_a_gpu_are_few_and_not_too_large() -> None:
    """523 positions are 2^26 logits, 2,092 are 2^28; on a CPU a tile has 128."""
    expected = {0: 1, 523: 1, 524: 2, 3138: 6, 8192: 6, 12_552: 6, 20_920: 10, 262_144: 126}
    for positions, wanted in expected.items():
        for device, count in (("cuda", wanted), ("cpu", max(1, -(-positions // 128)))):
            slices = tile_slices(positions, 128_256, torch.device(device))
            assert len(slices) == count
            assert [i for part in slices for i in range(part.start, part.stop)] == list(range(positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*PLAIN, *MORE])
def test_the_check_passes_them(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, {**PLAIN, **MORE}[kind]).to(dtype)
    require_same_logits(model, TiledHead(model, "cpu"), 384, 64, "cpu")


def spoilt(change: Callable[[Tensor], Tensor]) -> Any:
    """A Llama whose logits are changed after the head."""
    model = build("llama", SHAPE)
    own = model.forward

    def altered(**inputs: Any) -> Any:
        output = own(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = altered
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * (1 + 1e-4 * torch.arange(logits.shape[1]))[:, None],  # by where a slot lies
        lambda logits: logits - 1e-3 * logits.cumsum(1),  # by those before it
    ],
)
def test_a_model_whose_logits_depend_on_the_tile_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = spoilt(change)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .*use tile_head=False"):
        require_same_logits(model, TiledHead(model, "cpu"), 384, 64, "cpu")


def test_a_model_that_only_scales_its_logits_is_not() -> None:
    model = spoilt(lambda logits: logits.tanh() * 3)
    require_same_logits(model, TiledHead(model, "cpu"), 384, 64, "cpu")


def test_a_model_that_cannot_be_run_in_tiles_is_refused() -> None:
    class Sealed(BaseModelOutputWithPast):
        """An output that only its own model can make."""

        def __init__(self, *, seal: bool, **fields: Any) -> None:
            super().__init__(**fields)

    model = build("llama", SHAPE)
    model.model.register_forward_hook(lambda module, inputs, output: Sealed(seal=True, **output))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot run .*; use tile_head=False"):
        require_same_logits(model, TiledHead(model, "cpu"), 384, 64, "cpu")


def test_a_model_without_hidden_states_is_refused() -> None:
    class Bigram(nn.Embedding):
        def forward(self, input_ids: Tensor, **rest: Any) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids))

    with pytest.raises(ModelError, match=r"Bigram cannot run .* no part of it returns hidden states; use tile_head="):
        TiledHead(Bigram(384, 384), "cpu")


def state(model: nn.Module) -> list[Any]:
    return [(part, part.__dict__.get("forward"), len(part._forward_hooks)) for part in model.modules()]


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = build("llama", SHAPE), batch()
    before = state(model)
    tiled = TiledHead(model, "cpu")
    require_same_logits(model, tiled, 384, 64, "cpu")
    in_tiles(model, *inputs)
    assert state(model) == before
    model.lm_head.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    for fails in (lambda: tiled.hidden(*inputs[:2]), lambda: tiled.logits(torch.zeros(2, 32))):
        with pytest.raises(ZeroDivisionError):
            fails()
    assert state(model) == before


def test_hooks_of_accelerate_keep_working() -> None:
    """Weights that are loaded only while their part runs, by a forward that stands where the stub stands."""
    model, inputs = build("gemma2", MORE["gemma2"]), batch()
    own = in_one_piece(model, *inputs)
    accelerate.cpu_offload(model, torch.device("cpu"))
    accelerate.hooks.add_hook_to_module(model.model, accelerate.hooks.ModelHook())
    before = state(model)
    assert model.lm_head.weight.device.type == "meta" and "forward" in vars(model.model)
    tiles = in_tiles(model, *inputs)
    assert state(model) == before
    assert torch.equal(in_one_piece(model, *inputs), own)
    torch.testing.assert_close(torch.cat(tiles), own)


def opened(folder: Path, **changes: Any) -> OpenedTeacher:
    """A teacher of rows of 24 slots."""
    spec = dump_options(folder, folder, folder, **changes).teacher_spec
    return open_teacher(spec, RowSpec(vocab_size=320, seq_len=24))


def asking(rule: Selection, seed: int = 0) -> TargetRequest:
    return TargetRequest(selection=rule, temperatures=(1.0, 2.0), seed=seed)


def some_rows(rows: int = 3, length: int = 22) -> list[PackedRow]:
    random = np.random.default_rng(0)
    lengths = np.array([9, length - 9], np.int32)
    return [
        PackedRow(tokens=random.integers(8, 320, length).astype(np.int32), piece_lengths=lengths,
                  piece_documents=np.array([2 * r, 2 * r + 1]))
        for r in range(rows)
    ]  # fmt: skip


def assert_same(some: SparseTargets, others: SparseTargets) -> None:
    """Up to the last bits of a logit, which may also swap two ids whose logits are as close."""
    same = some.ids == others.ids
    assert same.float().mean() > 0.99
    for name in ("logprobs", "log_partition", "log_tail", "entropy", "label_logprob"):
        torch.testing.assert_close(getattr(some, name), getattr(others, name), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["topk", "full"])
def test_targets_in_tiles_are_those_of_whole_logits(teacher: Path, kind: str) -> None:
    """Of a padded vocabulary: the model has 384 ids, its tokenizer 320."""
    rule, rows = Selection(kind), some_rows()
    tiled, whole = opened(teacher), opened(teacher, tile_head=False)
    assert [t.compute["tile_head"] for t in (tiled, whole)] == [True, False]
    some, others = (model.targets(rows, asking(rule)) for model in (tiled, whole))
    assert some.counts == others.counts == [20, 20, 20]
    assert some.targets.ids.max() < 320
    assert_same(some.targets, others.targets)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["topk", "ipps"])
def test_logits_of_one_tile_at_a_time(teacher: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(teacher)
    real, made, alive = TiledHead.logits, [], []

    def listen(self: TiledHead, hidden: Tensor) -> Tensor:
        alive.append(sum(not tile.expired() for tile in made))
        logits = real(self, hidden)
        made.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(TiledHead, "logits", listen)
    model.targets(some_rows(), asking(Selection(kind=kind, k=8)))
    assert len(alive) > 1 and not any(alive)


@pytest.mark.usefixtures("small_tiles")
def test_draws_are_keyed_by_shard_row_and_slot(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(teacher)
    asked: list[tuple[int, Tensor]] = []

    def listen(rule: Selection, seed: int, keys: Tensor) -> Tensor | None:
        asked.append((seed, keys))
        return draws(rule, seed, keys)

    monkeypatch.setattr(opened_teacher, "draws", listen)
    model.targets(some_rows(2), asking(Selection(k=8), seed=3), shard=7, first_row=40)
    ((seed, keys),) = asked
    assert seed == 3 and keys.dtype == torch.int64
    slots = [*range(8), *range(9, 21)]  # two pieces, of 9 and 13 tokens
    assert keys.tolist() == [[7, row, slot] for row in (40, 41) for slot in slots]


@pytest.mark.parametrize("tile_head", [True, False])
def test_rows_without_a_target(teacher: Path, tile_head: bool) -> None:
    model = opened(teacher, tile_head=tile_head)
    row = PackedRow(
        tokens=np.arange(9, dtype=np.int32), piece_lengths=np.array([9], np.int32), piece_documents=np.zeros(1, int),
        supervised=np.zeros(9, bool),
    )  # fmt: skip
    found = model.targets([row, row], asking(Selection(k=8)))
    assert found.counts == [0, 0] and found.targets.entropy.shape == (0,) and found.targets.ids.shape == (0, 8)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tile_head", [True, False])
def test_bad_logits_in_a_later_tile_are_named(teacher: Path, tile_head: bool) -> None:
    model = opened(teacher, tile_head=tile_head)
    rows = some_rows()
    rows[1].tokens[12] = 7  # the fourth token of the second piece
    with torch.no_grad():
        model.engine.model.get_input_embeddings().weight[7] = torch.nan  # type: ignore[attr-defined]
    with pytest.raises(LogitsError, match="in document 3 of the corpus, 3 tokens into its piece") as caught:
        model.targets(rows, asking(Selection(k=8)))
    assert caught.value.position == 20  # the first of the row, all of which is bad: see `_find_bad`


def test_a_dump_can_be_told_to_hold_whole_logits(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    for name, tile_head in (("tiled", True), ("whole", False)):
        dump(dump_options(teacher, corpus, tmp_path / name, tile_head=tile_head, limit_docs=30))
    tiled, whole = open_cache(tmp_path / "tiled"), open_cache(tmp_path / "whole")
    assert len(tiled) == len(whole) > 3
    for one, two in zip(tiled, whole, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert_same(one.targets[one.labels != -100], two.targets[two.labels != -100])


PEAK = """
import sys
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from kdcache import Selection
from kdcache.planning.memory import peak_resident
from kdcache.rows import PackedRow, RowSpec
from kdcache.teacher.engines.base import TargetRequest, TeacherSpec
from kdcache.teacher.open_teacher import open_teacher

length, rows, folder = 1024, 4, sys.argv[2]
vocab = AutoConfig.from_pretrained(folder).vocab_size
tokens = np.random.default_rng(0).integers(0, vocab, length).astype(np.int32)
row = PackedRow(tokens=tokens, piece_lengths=np.array([length], np.int32), piece_documents=np.zeros(1, int))
with torch.inference_mode():  # what a model and a forward pass of its body take, and libraries on first use
    body = AutoModelForCausalLM.from_pretrained(folder).model
    body(input_ids=torch.from_numpy(np.stack([tokens] * rows)).long(), use_cache=False)
before = peak_resident()
spec = TeacherSpec(model=folder, device="cpu", tile_head=sys.argv[1] == "tiled")
teacher = open_teacher(spec, RowSpec(vocab_size=vocab, seq_len=length))
teacher.targets([row] * rows, TargetRequest(selection=Selection(k=64)))
print((peak_resident() - before) / (4 * vocab * length * rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "least", "most"),
    [("tiled", 0, 0.25), pytest.param("whole", 0.28, 9, marks=pytest.mark.long)],  # that logits made whole are seen
)
def test_memory_above_the_models_own(how: str, least: float, most: float, tmp_path: Path) -> None:
    """As a share of the logits of 4 rows, probe and check included; of all of them the kernel may take some back."""
    config = LlamaConfig(
        vocab_size=152_064, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = [sys.executable, "-c", PEAK, how, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert least <= float(done.stdout) <= most
