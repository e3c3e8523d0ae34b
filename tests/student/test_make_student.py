"""Students that are cut out of a teacher: what is kept is the teacher's, what is left out is what matters least."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import ConfigError, ModelError
from kdcache.isolation import packed_forward
from kdcache.pretrained import load_model
from kdcache.pretrained.blocks import find_blocks, left_out
from kdcache.student.from_teacher import importance
from kdcache.student.from_teacher.config import MakeStudentOptions
from kdcache.student.from_teacher.cut import Kept, narrowed, require_narrowable, with_fewer_layers
from kdcache.student.from_teacher.kept_states import KeptStates
from kdcache.student.from_teacher.kl_record import KlRecord
from kdcache.student.from_teacher.layers import LayerRule
from kdcache.student.from_teacher.make import make_student
from kdcache.student.from_teacher.sizes import Sizes, with_layers
from tests.making import TEACHER, dump_options, make_tokenizer

SIZES = {**TEACHER, "num_hidden_layers": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {"vocab_size": 384, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128,
             "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1},
    "qwen2": {**SIZES, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8,
              "max_window_layers": 2},
    "gemma3_text": {**SIZES, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "gpt_neox": {**SIZES, "tie_word_embeddings": False},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
"""Untied and tied heads, projections apart, fused and interleaved, grouped heads, sliding windows, experts."""


def random_model(kind: str, **changes: Any) -> Any:
    """A model whose layers have weight, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**KINDS.get(kind, SIZES), **changes}))
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(torch.randn(values.shape) / (values.shape[-1] ** 0.5 if values.dim() > 1 else 2))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(40)[None] * 7 % 320
    with torch.inference_mode():
        found: torch.Tensor = packed_forward(model, tokens, torch.arange(40)[None]).logits
    return found


def rounding(reference: torch.Tensor) -> float:
    """Room for sums in another order, some layers deep."""
    return 1e-4 * reference.abs().max().item()


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[pytest.mark.slow] if kind != "llama" else []) for kind in KINDS]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    make_tokenizer(folder)
    random_model(kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_cache(folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kdcache.teacher.dump import dump

    out = tmp_path_factory.mktemp("own") / "c"
    dump(dump_options(folder, corpus, out, limit_docs=30, temperatures="1"))
    return out


def make(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return make_student(MakeStudentOptions(teacher=str(folder), out=str(out), device="cpu", **changes))


def test_kept_layers_are_the_teachers_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path / "s", layers="0,3")
    teacher = load_model(folder, "teacher", "float32")
    student = load_model(tmp_path / "s", "student", "float32")
    assert type(student) is type(teacher) and made["layers"] == [0, 3]
    theirs, blocks = teacher.state_dict(), find_blocks(student)
    assert len(blocks.layers) == 2
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name.replace(f"{blocks.name}.1.", f"{blocks.name}.3.")]), name
    with left_out(find_blocks(teacher), [1, 2]):
        wanted = logits(teacher)
    assert (logits(student) - wanted).abs().max().item() <= rounding(wanted)
    assert (logits(teacher) - wanted).abs().max().item() > 100 * rounding(wanted)  # layers do something
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "s" / file).read_bytes() == (folder / file).read_bytes()


def test_what_lies_before_a_layer_need_not_be_computed_again(kind: str) -> None:
    """Runs that begin at a layer, over two batches, and over one that was not kept."""
    model = random_model(kind)
    blocks, places = find_blocks(model), torch.arange(40)[None]
    batches = [torch.arange(40)[None] * step % 320 for step in (7, 9, 11)]

    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = packed_forward(model, tokens, places).logits
        return found

    for gone in (frozenset[int](), frozenset({2})):
        states, ran = KeptStates(blocks, gone), list[int]()
        with states.kept():
            kept = [run(tokens) for tokens in batches[:2]]
        with left_out(blocks, gone):
            assert all(torch.equal(run(tokens), found) for tokens, found in zip(batches, kept, strict=False))
        for layer in sorted({0, 1, 2, 3} - gone):
            with left_out(blocks, gone | {layer}):
                wanted = [run(tokens) for tokens in batches]
            with ExitStack() as stack:
                for number, block in enumerate(blocks.layers):
                    inside = next(block.children())
                    note = functools.partial(lambda ran, number, *_: ran.append(number), ran, number)
                    stack.callback(inside.register_forward_hook(note).remove)
                stack.enter_context(states.without(layer))
                found = [run(tokens) for tokens in batches]
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
            later = [number for number in range(layer + 1, 4) if number not in gone]
            assert ran == [*later, *later, *range(4)]
            ran.clear()
    assert torch.equal(run(batches[0]), logits(random_model(kind)))


def test_all_layers_give_the_teachers_logits(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path / "s")
    assert made["parameters"]["ratio"] == 1 and made["layers"] == [0, 1, 2, 3]
    wanted = logits(load_model(folder, "teacher", "float32"))
    assert (logits(load_model(tmp_path / "s", "student", "float32")) - wanted).abs().max() <= rounding(wanted)


@pytest.mark.slow
def test_half_the_width_loads_trains_and_saves_as_its_class(
    kind: str, folder: Path, own_cache: Path, tmp_path: Path
) -> None:
    from kdcache.student.config import TrainConfig
    from kdcache.student.train import train

    experts = {"experts": 2} if kind == "mixtral" else {}
    made = make(
        folder, tmp_path / "s", cache=str(own_cache), hidden=16, heads=2, intermediate=32, heldout=0.1, **experts
    )
    sizes = made["sizes"]["student"]
    assert (sizes["hidden"], sizes["heads"], sizes["intermediate"]) == (16, 2, 32)
    assert sizes["head_dim"] == made["sizes"]["teacher"]["head_dim"] and sizes["experts"] == experts.get("experts")
    assert made["parameters"]["ratio"] > 2
    config = TrainConfig(
        cache=(str(own_cache),), student=str(tmp_path / "s"), out=str(tmp_path / "t"), steps=4, batch_rows=4, lr=5e-3,
        heldout=0.1, device="cpu",
    )  # fmt: skip
    heldout = train(config)["heldout"]
    assert heldout["before"]["kl"] == pytest.approx(made["heldout"]["kl"], rel=1e-5)
    assert heldout["after"]["kl"] < heldout["before"]["kl"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    assert type(trained).__name__ == made["class"] and trained.config.hidden_size == 16


def test_a_permutation_of_everything_changes_nothing(kind: str) -> None:
    require_narrowable(random_model(kind))


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_a_class_whose_width_is_not_understood_is_refused_by_name(kind: str) -> None:
    """Bloom's heads differ by their number; OPT is a class that no table here knows."""
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    heads = {"n_head": 4} if kind == "bloom" else {"num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads))
    with pytest.raises(ModelError, match=r"the width of (Bloom|OPT)ForCausalLM cannot be cut"):
        require_narrowable(model)


def test_a_class_whose_layers_know_their_number_is_refused_by_name() -> None:
    model = random_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with_fewer_layers(model, [0, 1], 384)  # these keep their numbers
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be made with other layers"):
        with_fewer_layers(model, [1, 3], 384)


def test_a_model_whose_blocks_cannot_be_told_apart_is_refused_by_name() -> None:
    model = random_model("llama")
    model.model.others = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(ModelError, match="LlamaForCausalLM has 2 lists of 4 layers"):
        find_blocks(model)
    model = random_model("llama")
    model.model.layers[1] = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of 4 layers of one class"):
        find_blocks(model)


def test_lists_of_a_value_for_each_layer_are_cut_with_the_layers() -> None:
    gemma = with_layers(random_model("gemma3_text").config, [1, 3])
    assert gemma.layer_types == ["sliding_attention", "full_attention"] and gemma.num_hidden_layers == 2
    qwen = with_layers(random_model("qwen2").config, [0, 2, 3])
    assert qwen.max_window_layers == 1 and qwen.layer_types == ["full_attention", *["sliding_attention"] * 2]
    llama = with_layers(random_model("llama", eos_token_id=[1, 2, 3, 4]).config, [0])
    assert llama.eos_token_id == [1, 2, 3, 4]
    moe = AutoConfig.for_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 3])
    assert with_layers(moe, [1, 3]).mlp_only_layers == [1]


def test_dropped_neurons_are_as_if_they_gave_nothing() -> None:
    """Cut and masked models must agree: heads and neurons whose output is set to 0 are heads and neurons left out."""
    model, heads, neurons = random_model("llama"), torch.tensor([2, 3]), torch.arange(0, 64, 3)
    old = Sizes.of(model.config, "Llama")
    things = {"heads": heads, "key_value_heads": torch.tensor([1]), "intermediate": neurons}
    new = MakeStudentOptions(teacher="t", out="o", text="x", heads=2, intermediate=len(neurons))
    cut = narrowed(model, old.cut(new), Kept(torch.arange(32), (things,) * 4))
    masked = random_model("llama")
    for layer in masked.model.layers:
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, :16] = 0  # heads 0 and 1 of width 8
            layer.mlp.down_proj.weight[:, [n for n in range(64) if n % 3]] = 0
    wanted = logits(masked)
    assert (logits(cut) - wanted).abs().max().item() <= rounding(wanted)


def test_scores_are_means_over_slots_and_norms_over_rows() -> None:
    activity, slots = torch.rand(3, 5, 4, dtype=torch.float64), torch.rand(3, 5) < 0.7
    slots[:, 0] = True
    scores = importance.Scores()
    scores.add(activity[:1], slots[:1])
    scores.add(activity[1:], slots[1:])
    rows = torch.stack([row[used].mean(0) for row, used in zip(activity, slots, strict=True)])
    torch.testing.assert_close(scores.values, rows.square().sum(0).sqrt(), rtol=1e-12, atol=0)


def test_what_matters_is_found_where_it_was_put() -> None:
    """A model in which one half of each kind of thing does nothing."""
    model = random_model("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 16:] *= 1e-3
        for name, values in model.named_parameters():
            if name.endswith("norm.weight"):
                values.abs_()[16:] *= 1e-3
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:8] *= 1e-3  # the first key, and its two heads
            layer.mlp.gate.weight[1:3] = 0  # the experts 0 and 3 are taken, with what is drawn for them
            layer.mlp.experts.down_proj[0, :, ::2] *= 1e-3
            layer.mlp.experts.down_proj[3, :, 1::2] *= 1e-3
    sizes = Sizes.of(model.config, "Mixtral")
    options = MakeStudentOptions(teacher="t", out="o", text="x", hidden=16, heads=2, intermediate=32, experts=2)
    activity = importance.Activity(model)
    tokens = torch.arange(80).view(2, 40) * 7 % 320
    places, slots = torch.arange(40).expand(2, -1), torch.ones(2, 40, dtype=torch.bool)
    activity.add({"input_ids": tokens, "position_ids": places, "slots": slots})
    kept = activity.kept(sizes.cut(options))
    assert kept.hidden.tolist() == list(range(16))
    for things in kept.layers:
        assert things["key_value_heads"].tolist() == [1] and things["heads"].tolist() == [2, 3]
        assert things["intermediate"][0].tolist() == list(range(1, 64, 2))
        assert things["intermediate"][3].tolist() == list(range(0, 64, 2))


def test_the_experts_that_the_router_takes_are_kept() -> None:
    model = random_model("mixtral")
    first = model.model.layers[0]
    with torch.no_grad():
        first.post_attention_layernorm.weight.zero_()
        first.post_attention_layernorm.weight[0] = 1  # routing then sees only one channel, of either sign
        first.mlp.gate.weight.zero_()
        first.mlp.gate.weight[:, 0] = torch.tensor([9.0, 0.0, 0.0, -9.0])
    activity = importance.Activity(model)
    places, slots = torch.arange(40)[None], torch.ones(1, 40, dtype=torch.bool)
    activity.add({"input_ids": torch.arange(40)[None] * 7 % 320, "position_ids": places, "slots": slots})
    options = MakeStudentOptions(teacher="t", out="o", text="x", experts=2)
    kept = activity.kept(Sizes.of(model.config, "Mixtral").cut(options))
    assert kept.layers[0]["experts"].tolist() == [0, 3]


def each(kl: Callable[[frozenset[int]], float]) -> Callable[[frozenset[int], int], float]:
    return lambda gone, layer: kl(gone | {layer})


def test_the_least_needed_layers_by_hand() -> None:
    """Layers 1 and 2 do the same: each alone can go, both cannot. Judged one by one, both would go."""

    def kl(without: frozenset[int]) -> float:
        return 5.0 * ({1, 2} <= without) + 0.1 * (1 in without) + 0.2 * (2 in without) + (0 in without) + (3 in without)

    out, rounds = importance.least_needed(4, 2, each(kl))
    assert out == {1, 3}  # of equal ones the later
    assert rounds == [{0: 1.0, 1: 0.1, 2: 0.2, 3: 1.0}, pytest.approx({0: 1.1, 2: 5.3, 3: 1.1})]


def test_half_of_the_layers_that_are_to_go_leave_in_each_round() -> None:
    """4, 2 and 1 of 7; and the last round sees that 5 and 6 stand in for each other, as the first cannot."""
    worth = {5: 0.51, 6: 0.52, 7: 0.6, 8: 2.0, 9: 3.0}
    seen: list[tuple[int, int]] = []

    def kl(without: frozenset[int]) -> float:
        return sum(worth.get(layer, 0.1) for layer in without) + 9.0 * ({5, 6} <= without)

    out, rounds = importance.least_needed(10, 3, each(kl), lambda done, total: seen.append((done, total)))
    assert [len(found) for found in rounds] == [10, 6, 4] and seen == [(done, 20) for done in range(1, 21)]
    assert out == {0, 1, 2, 3, 4, 5, 7}
    assert importance.least_needed(3, 3, each(kl)) == (frozenset(), [])


def test_a_layer_without_which_nothing_is_finite_stays() -> None:
    """Half of four would be two, but only the layer 2 can go; then the layer 1 can."""

    def kl(without: frozenset[int]) -> float:
        return math.inf if without & {0, 3} or without == {1} else 1.0

    out, rounds = importance.least_needed(4, 2, each(kl))
    assert out == {1, 2} and rounds == [
        {0: math.inf, 1: math.inf, 2: 1.0, 3: math.inf},
        {0: math.inf, 1: 1.0, 3: math.inf},
    ]
    assert importance.least_needed(2, 1, lambda *_: math.inf)[0] == {1}


def test_the_rows_that_layers_are_measured_on_hold_five_hundred_positions(cache: Path) -> None:
    from kdcache import open_cache
    from kdcache.student.from_teacher.calibration import rows_for_layers, rows_for_width

    opened = open_cache(cache)
    rows = rows_for_layers(opened, range(len(opened)), None)
    positions = [int((opened[row].labels != -100).sum()) for row in rows]
    assert sum(positions) + max(positions) >= 500 and sum(positions) < 650 and len(rows) < len(opened)
    assert rows_for_layers(opened, range(7), None) == list(range(7))  # there are no more
    assert len(rows_for_layers(opened, range(len(opened)), 3)) == 3
    assert len(rows_for_width(range(len(opened)), None)) == 16


def test_the_best_layers_are_chosen_on_the_cache_and_a_killed_choice_goes_on(
    teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.student.from_teacher import make as module

    measured = itertools.count()
    true = module.measure

    def dies_late(*arguments: Any, **more: Any) -> dict[str, Any]:
        if next(measured) == 2:
            raise KeyboardInterrupt
        return true(*arguments, **more)

    options = {"cache": str(cache), "layers": "best-1", "heldout": 0.1, "importance_rows": 4}
    monkeypatch.setattr(module, "measure", dies_late)
    with pytest.raises(KeyboardInterrupt):
        make(teacher, tmp_path / "s", **options)
    assert [p.name for p in tmp_path.iterdir()] == [".s.layers.jsonl"]
    made = make(teacher, tmp_path / "s", **options)
    assert next(measured) == 6  # the whole and one layer before it died; then the whole, the other, the held-out rows
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    monkeypatch.undo()
    assert make(teacher, tmp_path / "again", **options) == {**made, "out": str(tmp_path / "again")}
    (kl,) = made["layer_kl"]
    assert made["layers"] == [int(max(kl, key=lambda layer: kl[layer]))]  # without it, the KL would be larger


def test_rules_of_layers() -> None:
    assert LayerRule.parse(None).kept(3) == (0, 1, 2)
    assert LayerRule.parse("every-2").kept(5) == (0, 2, 4)
    assert LayerRule.parse("first-2").kept(5) == (0, 1)
    assert LayerRule.parse("0, 3").kept(5) == (0, 3)
    for text, words in {
        "0,0": "names 0 twice", "3,1": "in the order", "-1": "counted from 0", "all": "must be numbers",
        "every-0": "at least 1", "": "must be numbers",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            LayerRule.parse(text)
    for text in ("0,5", "first-6", "best-6"):
        with pytest.raises(ConfigError, match="teacher"):
            LayerRule.parse(text).kept(5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 33}, "hidden is 33, above the teacher's 32"),
        ({"hidden": 30}, "hidden is 30, which 4 heads do not divide"),
        ({"hidden": 30, "heads": 3}, "2 heads of the teacher share a key"),
        ({"experts": 2}, "the teacher has none"),
        ({"layers": "0,9"}, "layers names 9"),
        ({"layers": "best-1", "text": None}, "needs a cache"),
        ({"text": None}, "hidden needs a cache of the teacher, or a text"),
        ({"heads": 2, "text": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"heads": 0}, "heads is 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=words):
        make(teacher, tmp_path / "s", **{"text": str(corpus), "hidden": 32, **changes})
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_go_together() -> None:
    gpt2, mixtral = Sizes.of(random_model("gpt2").config, "GPT2"), Sizes.of(random_model("mixtral").config, "Mixtral")

    def cut(sizes: Sizes, **changes: Any) -> Sizes:
        return sizes.cut(MakeStudentOptions(teacher="t", out="o", text="x", **changes))

    assert cut(gpt2, hidden=16).heads == 2 and cut(gpt2, heads=1).hidden == 8
    with pytest.raises(ConfigError, match="the number of heads times 8"):
        cut(gpt2, hidden=20)
    with pytest.raises(ConfigError, match="the number of heads times 8"):
        cut(gpt2, hidden=16, heads=4)
    with pytest.raises(ConfigError, match="each token is given to 2"):
        cut(mixtral, experts=1)
    one_key = Sizes.of(random_model("llama", num_key_value_heads=1).config, "Llama")
    assert cut(one_key, heads=2).key_value_heads == 1


def test_a_folder_that_holds_something_is_left_alone(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        make(teacher, tmp_path, layers="first-1")
    assert (tmp_path / "kept.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_the_record_beside_the_student(teacher: Path, tmp_path: Path) -> None:
    made = make(teacher, tmp_path / "s", layers="first-1")
    record = json.loads((tmp_path / "s" / "make-student.json").read_text())
    options = record.pop("options")
    assert options["layers"] == "first-1"
    assert record == {name: made[name] for name in record} and record["layers"] == [0]


def test_the_same_command_again_finds_what_it_has_made(teacher: Path, tmp_path: Path) -> None:
    made = make(teacher, tmp_path / "s", layers="first-1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    assert make(teacher, tmp_path / "s", layers="first-1") == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before
    with pytest.raises(ConfigError, match="exists already"):
        make(teacher, tmp_path / "s", layers="0")


@pytest.mark.slow
def test_a_real_teacher_in_bfloat16_keeps_its_dtype_and_its_bits(assets: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = assets / "models/lab32k"
    make(folder, tmp_path / "s", layers="every-2")
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "s" / "model.safetensors")
    for name, value in ours.items():
        head, found, rest = name.partition("model.layers.")
        number, _, rest = rest.partition(".")
        source = f"model.layers.{2 * int(number)}.{rest}" if found else head
        assert value.dtype == torch.bfloat16 and torch.equal(value, theirs[source]), name


@pytest.fixture(scope="module")
def stories(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a real teacher."""
    from kdcache.teacher.dump import dump

    folder = tmp_path_factory.mktemp("stories")
    (folder / "stories.txt").write_text((assets / "text/tinystories.txt").read_text()[:20000])
    options = {"seq_len": 128, "k": 32, "temperatures": "1"}
    dump(dump_options(assets / "models/stories260K", folder / "stories.txt", folder / "c", **options))
    return folder / "c"


@pytest.mark.slow
def test_the_best_layers_of_a_real_teacher_beat_every_second(assets: Path, stories: Path, tmp_path: Path) -> None:
    kls = {
        rule: make(
            assets / "models/stories260K", tmp_path / rule, cache=str(stories), layers=rule, heldout=0.3,
            importance_rows=8,
        )["heldout"]["kl"]
        for rule in ("best-3", "every-2")
    }  # fmt: skip
    assert kls["best-3"] < kls["every-2"]


@pytest.mark.slow
def test_what_is_kept_by_activity_is_better_than_the_rest(assets: Path, stories: Path) -> None:
    """On a real model: the neurons with the largest scores give a lower KL than those with the smallest."""
    from kdcache import open_cache
    from kdcache.student.evaluation import measure
    from kdcache.student.from_teacher.calibration import of_cache

    cache, model = open_cache(stories), load_model(assets / "models/stories260K", "teacher", "float32").eval()
    old, activity = Sizes.of(model.config, "Llama"), importance.Activity(model)
    for batch in of_cache(cache, range(0, len(cache), 2), 8):
        activity.add(batch)
    for name, value in {"intermediate": 86, "heads": 4, "hidden": 48}.items():
        new = old.cut(MakeStudentOptions(teacher="t", out="o", text="x", **{name: value}))
        best = activity.kept(new)
        worst = Kept(_others(best.hidden, old.hidden), tuple(_rest(things, old) for things in best.layers))
        if name == "hidden":
            worst = Kept(torch.cat([worst.hidden, best.hidden])[: new.hidden].sort().values, best.layers)
        else:
            worst = Kept(best.hidden, worst.layers)
        kls = [
            measure(narrowed(model, new, kept), cache, range(1, len(cache), 2), torch.device("cpu"))["kl"]
            for kept in (best, worst)
        ]
        assert kls[0] < kls[1], (name, kls)


def _others(kept: torch.Tensor, count: int) -> torch.Tensor:
    return torch.tensor(sorted(set(range(count)) - set(kept.tolist())), dtype=torch.long)


def _rest(things: dict[str, torch.Tensor], old: Sizes) -> dict[str, torch.Tensor]:
    """What was not kept, where something was left out."""
    rest = {role: _others(kept, getattr(old, role)) for role, kept in things.items()}
    return {role: rest[role] if len(rest[role]) else things[role] for role in things}


def training(teacher: Path, cache: Path, out: Path, **changes: Any) -> Any:
    from kdcache.student.config import TrainConfig

    usual = {"steps": 4, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "save_every": 2, "device": "cpu"}
    return TrainConfig(**{**usual, "cache": (str(cache),), "init_from": str(teacher), "out": str(out), **changes})


@pytest.mark.slow
def test_a_training_that_cuts_its_student_is_one_that_was_given_it(teacher: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from kdcache.student.train import train

    cut = {"layers": "best-1", "hidden": 16, "heads": 2, "importance_rows": 4}
    made = make(teacher, tmp_path / "s", cache=str(cache), heldout=0.1, **cut)
    two = train(training(teacher, cache, tmp_path / "two", init_from=None, student=str(tmp_path / "s")))
    one = train(training(teacher, cache, tmp_path / "one", **cut))
    assert one["heldout"] == two["heldout"] and one["heldout"]["before"]["kl"] == pytest.approx(made["heldout"]["kl"])
    assert one["start"] == {name: made[name] for name in one["start"]}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and ours.keys() == theirs.keys()
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith(".")]
    assert "cut out of it: layers `best-1`" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.slow
def test_a_training_that_cut_its_student_is_resumed_with_it(
    teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.student import train as module

    config = training(teacher, cache, tmp_path / "s", layers="0")
    whole = module.train(training(teacher, cache, tmp_path / "whole", layers="0"))

    def dies(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.train(config, dies)
    again = training(teacher, cache, tmp_path / "s", layers="0", resume=True)
    monkeypatch.setattr(module, "start_from", None)  # what was cut is there
    assert module.train(again)["heldout"] == whole["heldout"]


def test_a_student_is_given_or_cut() -> None:
    from kdcache.student.config import TrainConfig

    for given, words in (
        ({}, "student is missing"),
        ({"student": "s", "init_from": "t"}, "student and init_from exclude each other"),
        ({"student": "s", "layers": "every-2"}, "layers needs a teacher"),
        ({"init_from": "t", "layers": "0,0"}, "names 0 twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainConfig(cache=("c",), out="o", **given)


def test_several_ranks_cut_no_student(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.student.preflight import require_environment

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the run has 2 ranks: use make-student first"):
        require_environment(training(Path("t"), Path("c"), Path("o")), torch.device("cpu"))


def test_a_record_of_kls_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path, about = tmp_path / "r.jsonl", {"teacher": "a"}
    KlRecord(path, about).kl(frozenset(), lambda: 1.5)
    KlRecord(path, about).kl(frozenset({3, 1}), lambda: 2.5)
    with path.open("a") as file:
        file.write('{"without": [7], "k')
    record = KlRecord(path, about)
    assert record.kl(frozenset({1, 3}), lambda: 9.0) == 2.5 and record.kl(frozenset(), lambda: 9.0) == 1.5
    assert record.kl(frozenset({7}), lambda: 9.0) == 9.0
    assert KlRecord(path, {"teacher": "b"}).kl(frozenset(), lambda: 4.0) == 4.0
    assert len(path.read_text().splitlines()) == 2
    record.delete()
    assert not path.exists()


def test_a_cache_of_another_vocabulary_is_refused_before_anything_is_measured(cache: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "small", 300)
    random_model("llama", vocab_size=300).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="a vocabulary of 300, which does not cover the cache's 320 ids"):
        make(tmp_path / "small", tmp_path / "s", cache=str(cache), layers="best-1")
    make_tokenizer(tmp_path / "other", 310)
    random_model("llama").save_pretrained(tmp_path / "other")
    backend = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(backend.replace('"</s>"', '"<end>"'))
    with pytest.raises(ModelError, match="another tokenizer than the cache"):
        make(tmp_path / "other", tmp_path / "s", cache=str(cache), layers="best-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "small"]
