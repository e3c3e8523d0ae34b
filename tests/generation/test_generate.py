"""Corpora that a model writes: its own text, the same whoever makes it, and what a dump makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import open_cache, verify_cache
from kdcache.errors import ConfigError, CorpusError, KdcacheError, ModelError
from kdcache.generated_corpus import find_generated
from kdcache.generation.generate import generate
from kdcache.generation.options import GenerateOptions
from kdcache.teacher.dump import dump
from tests.generation.test_draw import dense, require_law
from tests.making import TEXTS, dump_options, make_model, make_odd, make_tokenizer
from tests.objects import Bucket

PROMPTS = [text[: 5 + 7 * (n % 9)] for n, text in enumerate(TEXTS[:20])]


def options(writer: Path, prompts: Path | str, out: Path | str, **changes: Any) -> GenerateOptions:
    settings = {"max_new_tokens": 12, "docs_per_shard": 6, "batch_rows": 4, "device": "cpu", **changes}
    return GenerateOptions(writer=str(writer), prompts=str(prompts), out=str(out), **settings)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return path


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def split(record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Prompt and completion of a record."""
    edge = record["completion_mask"].index(1)
    assert record["completion_mask"] == [0] * edge + [1] * (len(record["input_ids"]) - edge)
    return record["input_ids"][:edge], record["input_ids"][edge:]


def require_greedy(writer: Path, out: Path, **settings: Any) -> None:
    """Each completion is what transformers' own `generate` gives for its prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(writer, dtype=torch.float32).eval()
    for record in records(out):
        prompt, completion = split(record)
        ids = torch.tensor([prompt])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        assert completion == own[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "mamba", "lfm2", "gpt_oss"))]
)
def test_greedy_text_is_that_of_transformers(tmp_path: Path, prompts: Path, kind: str) -> None:
    if kind in ("llama", "gpt2"):
        make_tokenizer(tmp_path / "w")
        make_model(tmp_path / "w", kind, **({"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {}))
    else:
        make_odd(tmp_path / "w", kind)
    summary = generate(options(tmp_path / "w", prompts, tmp_path / "c", temperature=0, stop=("</s>",)))
    assert summary["complete"] and summary["completions"] == len(PROMPTS)
    assert len({len(split(record)[0]) for record in records(tmp_path / "c")}) > 5, "nothing was padded"
    padded_ids = list(range(320, 384))  # the model has them, and its tokenizer does not
    require_greedy(
        tmp_path / "w", tmp_path / "c", max_new_tokens=12, eos_token_id=1, pad_token_id=0, suppress_tokens=padded_ids
    )


@pytest.mark.slow
@pytest.mark.assets
def test_greedy_text_of_a_trained_model(assets: Path, tmp_path: Path) -> None:
    writer, stories = assets / "models/stories260K", tmp_path / "p.jsonl"
    texts = (assets / "text/tinystories.txt").read_text().split("\n\n")[:24]
    stories.write_text("".join(json.dumps({"text": text[: 20 + 9 * n]}) + "\n" for n, text in enumerate(texts)))
    generate(options(writer, stories, tmp_path / "c", temperature=0, max_new_tokens=60, batch_rows=8))
    require_greedy(writer, tmp_path / "c", max_new_tokens=60)
    tokenizer = AutoTokenizer.from_pretrained(writer)
    for record in records(tmp_path / "c"):  # its tokens begin with their spaces, which a text must not lose
        assert record["prompt"] + record["completion"] == tokenizer.decode(record["input_ids"]).removesuffix("</s>")


def test_tokens_are_drawn_from_the_writer(sure_teacher: Path, tmp_path: Path) -> None:
    """The first token of many documents follows p(. | BOS), the second that behind the commonest first one."""
    for temperature, top_p in ((1.0, 1.0), (1.5, 0.8)):
        out = tmp_path / f"{temperature}"
        generate(
            options(
                sure_teacher, "none", out, samples=3000, max_new_tokens=2, docs_per_shard=1500, batch_rows=500,
                temperature=temperature, top_p=top_p,
            )
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(sure_teacher, dtype=torch.float32).eval()
        texts = [record["input_ids"] for record in records(out)]
        assert len(texts) == 3000 and all(ids[0] == 0 for ids in texts)
        first = torch.tensor([ids[1] for ids in texts])
        common = int(first.mode().values)
        second = torch.tensor([ids[2] for ids in texts if ids[1] == common])
        assert len(second) > 100
        with torch.inference_mode():
            logits = model(torch.tensor([[0, common]])).logits[0, :, :320]
        for tokens, row in ((first, logits[0]), (second, logits[1])):
            require_law(torch.bincount(tokens, minlength=320), dense(row, temperature, top_p))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_log_probabilities_are_the_models_own(
    teacher: Path, prompts: Path, tmp_path: Path, temperature: float, top_p: float
) -> None:
    generate(options(teacher, prompts, tmp_path / "c", temperature=temperature, top_p=top_p))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    drawn = 0
    for record in records(tmp_path / "c"):
        prompt, completion = split(record)
        assert record["writer_logp"][: len(prompt)] == record["model_logp"][: len(prompt)] == [None] * len(prompt)
        with torch.inference_mode():
            logits = model(torch.tensor([record["input_ids"]])).logits[0, len(prompt) - 1 : -1, :320]
        for token, row, logp, own in zip(
            completion, logits, record["writer_logp"][len(prompt) :], record["model_logp"][len(prompt) :], strict=True
        ):
            # a forward pass over all tokens at once rounds otherwise than one token after the other
            assert logp == pytest.approx(dense(row, temperature, top_p)[token].log().item(), abs=1e-3)
            assert own == pytest.approx(row.double().log_softmax(-1)[token].item(), abs=1e-3)
            drawn += logp != own
    assert bool(drawn) == (temperature != 1)


@pytest.mark.slow
def test_nothing_else_decides_what_is_written(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    """Other shards, another batch: the same text. Another seed, another sample: another one."""
    changes = {"a": {}, "b": {"docs_per_shard": 20, "batch_rows": 1}, "seed": {"seed": 1}, "two": {"samples": 2}}
    found = {}
    for name, change in changes.items():
        generate(options(teacher, prompts, tmp_path / name, **change))
        found[name] = {(r["document"], r["sample"]): r["input_ids"] for r in records(tmp_path / name)}
    assert found["a"] == found["b"]
    assert found["a"] == {key: ids for key, ids in found["two"].items() if key[1] == 0}
    assert sum(found["a"][key] == found["seed"][key] for key in found["a"]) < 3
    assert sum(found["two"][n, 0] == found["two"][n, 1] for n in range(len(PROMPTS))) < 3
    assert list(found["two"]) == sorted(found["two"]), "records stand in the order of the prompts"


def test_any_workers_make_the_same_files(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    whole = generate(options(teacher, prompts, tmp_path / "whole"))
    assert whole["shards"] == {"planned": 4, "written": 4, "by_this_worker": 4}
    second = generate(options(teacher, prompts, tmp_path / "c", worker="1/2"))
    assert not second["complete"] and second["shards"]["by_this_worker"] == 2
    with pytest.raises(CorpusError, match="2 of 4 shards are missing; run kdcache generate again"):
        find_generated(str(tmp_path / "c"))
    assert generate(options(teacher, prompts, tmp_path / "c", worker="0/2"))["complete"]
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    (tmp_path / "c/shard-00002.jsonl").unlink()
    again = generate(options(teacher, prompts, tmp_path / "c"))
    assert again["complete"] and again["shards"]["by_this_worker"] == 1 and again["completions"] == 6
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_dump_takes_it_as_it_is(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    generate(options(teacher, prompts, out))
    written = {record["document"]: record for record in records(out)}
    summary = dump(dump_options(teacher, out, tmp_path / "c"))
    assert summary["documents"] == len(PROMPTS) and summary["bad"] == 0 and verify_cache(tmp_path / "c").ok
    cache, seen = open_cache(tmp_path / "c"), 0
    origin = cache.manifest.origin["generated"]
    assert origin["writer"] == str(teacher) and origin["writer_sha256"] == cache.manifest.teacher_sha256
    assert origin["temperature"] == 1 and origin["prompts"] == str(prompts)
    for packed, _ in cache.read_rows(range(len(cache))):
        ends = packed.piece_lengths.cumsum()
        for start, end, document in zip(ends - packed.piece_lengths, ends, packed.piece_documents, strict=True):
            record = written[int(document)]
            assert packed.tokens[start:end].tolist() == record["input_ids"]
            logp = [value or 0.0 for value in record["writer_logp"]]
            assert packed.extras["writer_logp"][start:end, 0].tolist() == logp
    for row in cache:
        labels = row.labels != -100
        of_labels = row.extras["writer_logp"][:, 0].roll(-1)[labels]
        assert row.targets.label_logprob is not None
        torch.testing.assert_close(of_labels, row.targets.label_logprob[labels], rtol=0, atol=1e-3)
        seen += int(labels.sum())
    assert seen == sum(sum(record["completion_mask"]) for record in written.values())


def test_its_text_is_there_for_other_tokenizers(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    generate(options(teacher, prompts, tmp_path / "text"))
    make_tokenizer(tmp_path / "other", size=300)
    make_model(tmp_path / "other")
    refused = "holds token ids of .*, whose vocabulary is not that of the teacher"
    with pytest.raises(CorpusError, match=refused):
        dump(dump_options(tmp_path / "other", tmp_path / "text", tmp_path / "c"))
    with pytest.raises(CorpusError, match=r"hold token ids of .*, whose vocabulary is not that of the writer"):
        generate(options(tmp_path / "other", tmp_path / "text", tmp_path / "d"))
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()
    ignored = "input_ids,completion_mask"
    summary = dump(dump_options(tmp_path / "other", tmp_path / "text", tmp_path / "c", ignore_columns=ignored))
    assert summary["documents"] == len(PROMPTS) and "writer_logp" not in summary["extras"]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"text": "The fox"}, "<s>The fox"),
        ({"prompt": "The fox"}, "<s>The fox"),
        ({"prompt": "The fox", "completion": " jumped"}, "<s>The fox"),
        ({"prompt": [{"role": "user", "content": "Who?"}]}, "<user>Who?</s><assistant>"),
        (
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox."}]},
            "<user>Who?</s><assistant>",
        ),
        ({"instruction": "Who?", "output": "The fox."}, "<user>Who?</s><assistant>"),
        ({"input_ids": [0, 70, 71, 72], "completion_mask": [0, 0, 1, 1]}, None),
    ],
)
def test_prompts_of_every_form(teacher: Path, tmp_path: Path, record: dict[str, Any], prompt: str | None) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "t.jinja").write_text(CHAT)
    generate(
        options(
            teacher, tmp_path / "p.jsonl", tmp_path / "c", max_new_tokens=2, chat_template=str(tmp_path / "t.jinja")
        )
    )
    (found,) = records(tmp_path / "c")
    assert split(found)[0] == (
        [0, 70] if prompt is None else AutoTokenizer.from_pretrained(teacher).encode(prompt, add_special_tokens=False)
    )
    assert prompt is None or found["prompt"] == prompt


def test_documents_from_nothing(teacher: Path, tmp_path: Path) -> None:
    generate(options(teacher, "none", tmp_path / "c", samples=9, start=("The fox", "A cat")))
    assert [record["prompt"] for record in records(tmp_path / "c")] == ["<s>The fox", "<s>A cat"] * 4 + ["<s>The fox"]
    found = find_generated(str(tmp_path / "c"))
    assert found is not None and found.documents == 9 and found.shards == 2


def test_prompts_that_cannot_be_used_are_counted(teacher: Path, tmp_path: Path) -> None:
    long, path = "The quick old dog. " * 60, tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("The fox", "  ", long, "A cat")) + "{no\n")
    summary = generate(options(teacher, path, tmp_path / "c", samples=2))
    assert summary["dropped"] == {"no text": 1, "not JSON": 1, "too-long": 1}
    assert summary["complete"] and summary["completions"] == 4
    assert [(r["document"], r["sample"]) for r in records(tmp_path / "c")] == [(0, 0), (0, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1}, "temperature is -1, but must be at least 0"),
        ({"top_p": 0}, "top_p is 0, but must be above 0 and at most 1"),
        ({"samples": 0}, "samples is 0, but must be at least 1"),
        ({"stop": ("<nowhere>",)}, "stop is '<nowhere>', which is not a token of the writer"),
        ({"start": ("The",)}, "start is 'The', but documents begin with their prompts"),
        ({"prompts": "none"}, "prompts is none, which needs samples, the number of documents"),
        ({"max_new_tokens": 200}, "max_new_tokens is 200, but the writer .* was made for 128 positions"),
        ({"max_new_tokens": 127}, "the shortest prompt of .* has . tokens, and max_new_tokens leaves room for 1"),
        ({"writer": "nowhere/at/all"}, "the writer folder nowhere/at/all does not exist"),
        ({"prompts": "nowhere.jsonl"}, "the corpus nowhere.jsonl does not exist"),
        ({"worker": "2/2"}, "worker 2/2: I must lie in 0 to N-1"),
    ],
)
def test_what_is_refused(teacher: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KdcacheError, match=words):
        given = {"writer": teacher, "prompts": prompts, **changes}
        generate(options(given.pop("writer"), given.pop("prompts"), tmp_path / "c", **given))
    assert not (tmp_path / "c").exists()


def test_prompts_of_no_text_are_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(CorpusError, match=r"none of the 2 prompts of .* can be used \(left out: 2 no text; document 0"):
        generate(options(teacher, tmp_path / "p.jsonl", tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_folder_is_gone_on_with_as_the_same_or_not_at_all(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    generate(options(teacher, prompts, tmp_path / "c", worker="0/2"))
    before = files(tmp_path / "c")
    with pytest.raises(CorpusError, match=r"differs in temperature \(there: 1.0, asked: 0.5\), seed \(there: 0, asked"):
        generate(options(teacher, prompts, tmp_path / "c", temperature=0.5, seed=3))
    (tmp_path / "other.jsonl").write_text('{"text": "Another prompt"}\n')
    with pytest.raises(CorpusError, match=r"it differs in prompts_sha256 .*, documents \(there: 20, asked: 1\)"):
        generate(options(teacher, tmp_path / "other.jsonl", tmp_path / "c"))
    assert files(tmp_path / "c") == before
    with pytest.raises(CorpusError, match=r"holds no generated corpus but other files, such as p\.jsonl"):
        generate(options(teacher, prompts, prompts.parent))


def test_a_model_that_sees_padding_is_refused(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def blind(self: Any, *args: Any, attention_mask: Any = None, **more: Any) -> Any:
        return own(self, *args, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", blind)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM writes otherwise behind padding: .* use batch_rows 1"):
        generate(options(teacher, prompts, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_logits_that_are_no_numbers_are_named(tmp_path: Path, prompts: Path) -> None:
    make_tokenizer(tmp_path / "w")
    make_model(tmp_path / "w")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "w")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    model.save_pretrained(tmp_path / "w")
    with pytest.raises(ModelError, match="NaN or infinite in the batch that begins with prompt 0, after 0 tokens"):
        generate(options(tmp_path / "w", prompts, tmp_path / "c"))
    assert not files(tmp_path / "c")


def test_a_tokenizer_without_a_beginning_needs_a_start(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "w")
    make_model(tmp_path / "w")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["post_processor"] = None
    (tmp_path / "w/tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((tmp_path / "w/tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "w/tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no beginning-of-sequence token to write behind; give a text"):
        generate(options(tmp_path / "w", "none", tmp_path / "c", samples=2))
    assert generate(options(tmp_path / "w", "none", tmp_path / "c", samples=2, start=("The",)))["complete"]


@pytest.mark.slow
def test_a_corpus_in_an_object_store(teacher: Path, prompts: Path, bucket: Bucket, tmp_path: Path) -> None:
    generate(options(teacher, prompts, tmp_path / "here"))
    for worker in ("0/2", "1/2"):
        summary = generate(options(teacher, prompts, f"{bucket.url}/text", worker=worker))
    assert summary["complete"] and summary["shards"] == {"planned": 4, "written": 4, "by_this_worker": 2}
    assert {name: bucket.get(f"text/{name}") for name in files(tmp_path / "here")} == files(tmp_path / "here")
    for name in ("text", "text/*.jsonl"):
        out = tmp_path / name.replace("*", "all").replace("/", "-")
        dump(dump_options(teacher, f"{bucket.url}/{name}", out))
        assert open_cache(out).manifest.origin["generated"]["writer"] == str(teacher)
    bucket.delete("text/shard-00001.jsonl")
    with pytest.raises(CorpusError, match="1 of 4 shards are missing"):
        dump(dump_options(teacher, f"{bucket.url}/text", tmp_path / "c"))
