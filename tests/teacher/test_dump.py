"""The dump: what it keeps is what the teacher says, and every shard is a function of its documents."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache import open_cache, verify_cache
from kdcache.cache import Cache
from kdcache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    CorpusError,
    IncompleteCacheError,
    KdcacheError,
    LogitsError,
    ModelError,
)
from kdcache.teacher.dump import dump
from tests.making import TEXTS, dump_options, make_model, make_tokenizer


def files(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def assert_faithful(cache: Cache, teacher: Path, positions: int, tolerance: float) -> None:
    """Stored targets equal a plain forward of the same piece alone, at random positions."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    vocab, temperatures = cache.manifest.vocab_size, cache.manifest.temperatures
    for _ in range(positions):
        row = cache[int(random.integers(len(cache)))]
        slot = int(random.choice(np.flatnonzero(row.labels.numpy() != -100)))
        piece = (row.segments == row.segments[slot]).nonzero()[:, 0]
        offset = slot - int(piece[0])
        with torch.no_grad():
            logits = model(input_ids=row.tokens[piece][None]).logits[0, offset, :vocab].double()
        logp = logits.log_softmax(-1)
        target = row.targets[slot]
        ids = target.ids[: int(target.count)].long()
        assert row.labels[slot] == row.tokens[slot + 1] == row.tokens[piece][offset + 1]
        assert abs(float(target.label_logprob) - float(logp[row.labels[slot]])) < max(tolerance, 1e-4)
        torch.testing.assert_close(logp[ids], logp.topk(len(ids)).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(target.logprobs[: len(ids)].double(), logp[ids], atol=tolerance, rtol=0)
        assert float(target.entropy) == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-4)
        for column, t in enumerate(temperatures):
            partition = (logp / t).logsumexp(-1)
            tail = (logp / t).scatter(-1, ids, -torch.inf).logsumexp(-1) - partition
            assert float(target.log_partition[column]) == pytest.approx(float(partition), abs=1e-4)
            assert float(target.log_tail[column]) == pytest.approx(float(tail), abs=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float16", 2e-3)])
def test_targets_are_the_teachers(
    teacher: Path, corpus: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    summary = dump(dump_options(teacher, corpus, tmp_path / "c", precision=precision, temperatures="2,1"))
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.temperatures == (2.0, 1.0)
    assert_faithful(cache, teacher, 200, tolerance)
    assert summary["entries"] == 8 * summary["positions"]
    assert summary["positions"] == sum(int((row.labels != -100).sum()) for row in cache)
    assert all((row.targets.count == 0).eq(row.labels == -100).all() for row in cache)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float16", 2e-3)])
def test_targets_are_a_real_teachers(assets: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    real = assets / "models/stories260K"
    config = dump_options(
        real, assets / "text/tinystories.txt", tmp_path / "c", seq_len=256, k=16, precision=precision, limit_docs=400,
        batch_rows=8, docs_per_shard=None,
    )  # fmt: skip
    assert dump(config)["complete"]
    assert_faithful(open_cache(tmp_path / "c"), real, 200, tolerance)


@pytest.mark.slow
def test_a_compact_cache_is_close_small_and_the_same_by_any_workers(
    cache: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Six bits a value, ids re-ranked by the pilot of whoever creates the cache."""
    whole = dump(dump_options(teacher, corpus, tmp_path / "a", precision="6"))
    for i in (1, 0):
        dump(dump_options(teacher, corpus, tmp_path / "b", precision="6", worker=f"{i}/2"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert verify_cache(tmp_path / "a").ok
    compact, plain = open_cache(tmp_path / "a"), open_cache(cache)
    size = {name: sum(p.stat().st_size for p in path.glob("*.arrow")) for name, path in
            (("compact", tmp_path / "a/shards"), ("plain", cache / "shards"))}  # fmt: skip
    assert whole["complete"] and size["compact"] < 0.5 * size["plain"]
    assert len(compact.manifest.id_order) > 100
    for one, two in zip(compact, plain, strict=True):
        keep = two.labels != -100
        a, b = one.targets[keep], two.targets[keep]
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(a.ids.long().sort(-1).values, b.ids.long().sort(-1).values)
        for t in (1.0, 2.0):
            (p, tail), (q, stored) = b.at_temperature(t), a.at_temperature(t)
            p, q = p.gather(-1, b.ids.argsort(-1)), q.gather(-1, a.ids.argsort(-1))
            kl = (p.exp() * (p - q)).sum(-1) + tail.exp() * (tail - stored)
            assert kl.max() < 1e-2 and kl.mean() < 1e-3


def test_every_document_is_there_once(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    dump(dump_options(teacher, corpus, tmp_path / "c", seq_len=128))  # as long as the longest document
    found: dict[int, str] = {}
    for row in open_cache(tmp_path / "c"):
        for piece, document in enumerate(row.documents.tolist()):
            assert document not in found
            found[document] = tokenizer.decode(row.tokens[row.segments == piece], skip_special_tokens=True)
    assert [found[i] for i in range(len(TEXTS))] == TEXTS


def test_the_same_dump_is_the_same_directory(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "c"
    dump(dump_options(teacher, corpus, again))
    assert files(again) == files(cache)


def give_batches_ahead(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Let the engine have so many batches before the first is waited for, as a GPU has."""
    from kdcache.teacher.engines.transformers import TransformersEngine

    built = TransformersEngine.__init__

    def build(self: Any, *given: Any) -> None:
        built(self, *given)
        self.lookahead = ahead

    monkeypatch.setattr(TransformersEngine, "__init__", build)


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_batches_on_their_way_come_back_in_order(
    cache: Path, teacher: Path, corpus: Path, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has the next batch before this one is waited for."""
    give_batches_ahead(monkeypatch, ahead)
    dump(dump_options(teacher, corpus, tmp_path / "c"))
    assert files(tmp_path / "c") == files(cache)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_any_workers_in_any_order_make_the_same_cache(
    cache: Path, teacher: Path, corpus: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    summaries = [dump(dump_options(teacher, corpus, tmp_path / "c", worker=f"{i}/3")) for i in order]
    assert [s["complete"] for s in summaries] == [False, False, True]
    assert sum(s["shards"]["by_this_worker"] for s in summaries) == 4
    assert files(tmp_path / "c") == files(cache)


def test_a_cache_is_created_for_workers_that_come_later(
    cache: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    config = dump_options(teacher, corpus, tmp_path / "c")
    created = dump(config, create_only=True)
    assert created["shards"] == {"planned": 4, "committed": 0, "by_this_worker": 0} and not created["complete"]
    made_later = ("shards", "commits", "seal.arrow")
    assert set(files(tmp_path / "c")) == {name for name in files(cache) if not name.startswith(made_later)}
    assert dump(config)["shards"]["by_this_worker"] == 4
    assert dump(config, create_only=True)["complete"]
    assert files(tmp_path / "c") == files(cache)


def test_a_stopped_dump_goes_on_with_what_is_missing(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    shutil.copytree(cache, out)
    (out / "seal.arrow").unlink()
    (out / "commits/00002.json").unlink()  # stopped between data and commit
    (out / "commits/00001.json").unlink()
    (out / "shards/00001.arrow").unlink()
    with pytest.raises(IncompleteCacheError, match="2 of 4 shards are missing; run the same"):
        open_cache(out)
    assert len(open_cache(out, partial=True).commits) == 2
    summary = dump(dump_options(teacher, corpus, out))
    assert summary["complete"] and summary["shards"]["by_this_worker"] == 2
    assert files(out) == files(cache)
    assert dump(dump_options(teacher, corpus, out))["shards"]["by_this_worker"] == 0


def test_batch_size_changes_no_token_and_no_layout(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "c", batch_rows=3))
    for one, two in zip(open_cache(cache), open_cache(tmp_path / "c"), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
        torch.testing.assert_close(one.targets.logprobs, two.targets.logprobs, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"select": "ipps", "k": 6},
        {"select": "ipps", "k": 6, "adaptive": True, "force_label": True, "min_k": 2},
        {"select": "sample", "draws": 9, "sample_temperature": 2.0},
        {"select": "sample", "draws": 9, "proposal_power": 0.8},
        {"select": "topp", "top_p": 0.5, "force_label": True},
    ],
    ids=lambda rule: "-".join(str(value) for value in rule.values()),
)
def test_a_remade_shard_is_the_same_whoever_makes_it(
    rule: dict[str, Any], teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Bit for bit at one batch size; at another the same draws, but where a point lies within rounding of an edge."""
    whole, parts, other = (tmp_path / name for name in "abc")
    rule |= {"limit_docs": 90, "seed": 7}
    dump(dump_options(teacher, corpus, whole, **rule))
    for i in (1, 0):
        dump(dump_options(teacher, corpus, parts, worker=f"{i}/2", **rule))
    (parts / "commits/00001.json").unlink()  # made again, though the cache was sealed
    dump(dump_options(teacher, corpus, parts, **rule))
    assert files(parts) == files(whole)
    dump(dump_options(teacher, corpus, other, batch_rows=3, **rule))
    differing = positions = 0
    for one, two in zip(open_cache(whole), open_cache(other), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
        same = (one.targets.ids == two.targets.ids).all(-1) & (one.targets.count == two.targets.count)
        positions, differing = positions + int((one.labels != -100).sum()), differing + int((~same).sum())
        for name in ("logprobs", "weights"):
            a, b = (getattr(targets, name)[same] for targets in (one.targets, two.targets))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0, equal_nan=True)
        for name in ("log_partition", "entropy", "label_logprob"):
            torch.testing.assert_close(
                getattr(one.targets, name), getattr(two.targets, name), atol=1e-4, rtol=0, equal_nan=True
            )
    assert positions > 500 and differing <= 0.002 * positions + 1


def test_the_same_documents_elsewhere_go_on(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """A corpus may lie in another folder on another machine; its files have the same names and sizes."""
    (tmp_path / "there").mkdir()
    other = Path(shutil.copy(corpus, tmp_path / "there"))
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c/commits/00002.json").unlink()
    assert dump(dump_options(teacher, other, tmp_path / "c"))["complete"]
    assert files(tmp_path / "c") == files(cache)


def test_chat_targets_lie_on_the_assistants_tokens(teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.corpus.test_tokenise import PLAIN, TALK

    chatty = tmp_path / "teacher"
    shutil.copytree(teacher, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(chatty)
    corpus = tmp_path / "chat.jsonl"
    corpus.write_text((json.dumps({"messages": TALK}) + "\n") * 3)
    dump(dump_options(chatty, corpus, tmp_path / "c", seq_len=128))
    row = open_cache(tmp_path / "c")[0]
    first = row.labels[(row.segments == 0) & (row.labels != -100)]
    assert tokenizer.decode(first) == "four of them\nnone today\n"
    again = AutoTokenizer.from_pretrained(tmp_path / "c" / "tokenizer")
    assert again.chat_template == PLAIN


def test_tokenised_input_keeps_its_mask(teacher: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "ids.jsonl"
    records = [{"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {"input_ids": [9, 8], "labels": [9, 8]}]
    corpus.write_text("".join(json.dumps(r) + "\n" for r in records))
    dump(dump_options(teacher, corpus, tmp_path / "c", seq_len=8))
    row = open_cache(tmp_path / "c")[0]
    assert row.tokens.tolist() == [0, 5, 6, 7, 9, 8, 0, 0]
    assert row.labels.tolist() == [-100, 6, 7, -100, 8, -100, -100, -100]
    assert row.targets.count.tolist() == [0, 8, 8, 0, 8, 0, 0, 0]


def test_filters_are_reported_and_a_shard_may_be_empty(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    summary = dump(dump_options(teacher, corpus, tmp_path / "c", drop="^The (fox|cat)", docs_per_shard=10))
    dropped = sum(text.startswith(("The fox", "The cat")) for text in TEXTS)
    assert (summary["documents"], sum(summary["dropped"].values())) == (len(TEXTS), dropped)
    cache = open_cache(tmp_path / "c")
    assert cache.commits[0].rows == 0
    assert int(cache[0].documents[0]) == dropped
    assert verify_cache(tmp_path / "c").ok


def test_a_commit_says_what_was_left_out_what_ends_and_which_libraries_read_it(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the making of a shard's rows reports reaches its commit, the summary and the list."""
    import jinja2
    import tokenizers
    import transformers

    from kdcache.corpus.shards import BadRecord
    from kdcache.teacher.inputs import Inputs

    made = Inputs.shard_rows

    def with_bad(self: Inputs, shard: int) -> Any:
        first = int(self.plan.first[shard])
        bad = tuple(BadRecord(document=np.int64(first + n), reason=f"no {n}:\nat all") for n in (1, 0))  # type: ignore[arg-type]
        return dataclasses.replace(made(self, shard), dropped={"no": 2}, bad_records=bad, cut=3, truncated=shard)

    monkeypatch.setattr(Inputs, "shard_rows", with_bad)
    summary = dump(dump_options(teacher, corpus, tmp_path / "c"))
    cache = open_cache(tmp_path / "c")
    assert summary["complete"] and verify_cache(tmp_path / "c").ok
    assert (summary["dropped"], summary["bad"]) == ({"no": 8}, 8) and summary["cut"] == 12 and summary["truncated"] == 6
    assert summary["bad_records"][:2] == [
        {"document": 0, "reason": "no 0: at all"},
        {"document": 1, "reason": "no 1: at all"},
    ]
    assert (tmp_path / "c/bad_records.jsonl").read_text().count("\n") == 8
    ends = sum(int((row.labels == 1).sum()) for row in cache)
    assert summary["eos_labels"] == ends > 90
    compute = cache.commits[0].compute
    versions = {module.__name__: module.__version__ for module in (jinja2, tokenizers, transformers)}
    assert versions.items() <= compute.items() and {"kdcache", "python", "torch"} <= set(compute)


def test_a_worker_with_other_rules_is_refused_by_name(cache: Path, teacher: Path, corpus: Path) -> None:
    for rule, other in (
        ("eos", "never"), ("pack", "none"), ("overlong", "drop"), ("on_bad_record", "stop" ),
    ):  # fmt: skip
        before = getattr(open_cache(cache).manifest, rule)
        assert before != other
        with pytest.raises(CacheMismatchError, match=rf"{rule} \(cache: {before}, asked: {other}\)"):
            dump(dump_options(teacher, corpus, cache, **{rule: other}))


def test_two_writers_of_one_shard(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """A shard that another worker commits meanwhile is theirs; nothing of ours is left."""
    from kdcache.store.commit import Commit

    out, read = tmp_path / "c", Commit.read.__func__  # type: ignore[attr-defined]
    dump(dump_options(teacher, corpus, out, worker="1/2"))
    shutil.copy(cache / "shards/00000.arrow", out / "shards/00000.arrow")
    shutil.copy(cache / "commits/00000.json", out / "commits/00000.json")
    asked: list[int] = []

    def late(folder: Path, shard: int, sha256: str) -> Any:
        asked.append(shard)
        return None if shard == 0 and asked.count(0) == 1 else read(Commit, folder, shard, sha256)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.teacher.shard_maker.committed", lambda *_: [1, 3])
        patch.setattr(Commit, "read", late)
        summary = dump(dump_options(teacher, corpus, out))
    assert summary["complete"] and summary["shards"]["by_this_worker"] == 1
    assert files(out) == files(cache)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_poisoned_logits_name_the_document(
    teacher: Path, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    sick = tmp_path / "sick"
    shutil.copytree(teacher, sick)
    weights = load_file(sick / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, sick / "model.safetensors", metadata={"format": "pt"})
    corpus = tmp_path / "ids.jsonl"
    documents = ([1, 2, 3], [4, 5, 6, 7, 8, 9], [*range(10, 19)], [7, *range(10, 18)])  # a batch of two, two of one
    corpus.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    give_batches_ahead(monkeypatch, ahead)
    with pytest.raises(LogitsError, match=r"document 1 of the corpus, 3 tokens into its piece"):
        dump(dump_options(sick, corpus, tmp_path / "c", seq_len=10, batch_rows=1))
    assert not list(tmp_path.glob("c/commits/*"))


Change = Callable[[Path], dict[str, Any]]

BAD: dict[str, tuple[type[KdcacheError], str, dict[str, Any]]] = {
    "no teacher": (ModelError, "does not exist", {"teacher": "/nowhere/at/all"}),
    "k 0": (ConfigError, "k is 0", {"k": 0}),
    "k too large": (ConfigError, "k is 321, above the vocabulary of 320", {"k": 321}),
    "row too long": (ConfigError, "seq_len is 200, above the 128 positions", {"seq_len": 200}),
    "no corpus": (CorpusError, "does not exist", {"corpus": "/nowhere.txt"}),
    "no column": (CorpusError, "has no column 'body'; it has text", {"text_column": "body"}),
    "all dropped": (CorpusError, r"none of the 108 documents has a token .*108 min-chars", {"min_chars": 10**6}),
    "temperatures": (ConfigError, "temperatures", {"temperatures": "1,x"}),
    "negative temperature": (ConfigError, "temperatures", {"temperatures": "1,-2"}),
    "precision": (ConfigError, "precision is float8", {"precision": "float8"}),
    "selection": (ConfigError, "kind best", {"select": "best"}),
    "device": (ConfigError, "device quantum", {"device": "quantum"}),
    "cold": (ConfigError, "lie in 0.01 to 100", {"temperatures": "1,1e-40"}),
    "strange device": (ConfigError, "is not a cpu, cuda or mps device", {"device": "meta"}),
    "worker": (ConfigError, "I must lie in 0 to N-1", {"worker": "5/5"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case: str, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    error, words, changes = BAD[case]
    with pytest.raises(error, match=words) as caught:
        dump(dump_options(**{"teacher": teacher, "corpus": corpus, "out": tmp_path / "out", **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_weights(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in safetensors format"):
        dump(dump_options(bare, corpus, tmp_path / "out"))


def test_a_teacher_that_would_be_partly_invented(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    part = tmp_path / "part"
    shutil.copytree(teacher, part)
    weights = load_file(part / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, lm_head\.weight"):
        dump(dump_options(part, corpus, tmp_path / "out"))


def test_a_teacher_smaller_than_its_tokenizer(corpus: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t", vocab_size=300)
    with pytest.raises(ConfigError, match="predicts 300 tokens, but its tokenizer has 320"):
        dump(dump_options(tmp_path / "t", corpus, tmp_path / "out"))


def test_a_cache_of_another_configuration_is_not_touched(
    cache: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    shutil.copytree(cache, out)
    before = files(out)
    changes = {"seq_len": 32, "k": 4, "temperatures": "1", "precision": "float16", "min_chars": 3}
    for name, value in changes.items():
        with pytest.raises(CacheMismatchError, match="another configuration") as caught:
            dump(dump_options(teacher, corpus, out, **{name: value}))
        assert {"k": "selection", "min_chars": "filters"}.get(name, name) in str(caught.value)
    with pytest.raises(CacheMismatchError, match="its shards have docs_per_shard 30, not docs_per_shard 7"):
        dump(dump_options(teacher, corpus, out, docs_per_shard=7))
    with pytest.raises(CacheMismatchError, match="its shards have docs_per_shard 30, not chars_per_shard 5,000"):
        dump(dump_options(teacher, corpus, out, docs_per_shard=None, chars_per_shard=5000))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "something else"}) + "\n")
    with pytest.raises(CorpusError, match=r"it has a file other\.jsonl where that had texts\.jsonl"):
        dump(dump_options(teacher, other, out))
    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t", scale=2.0)
    with pytest.raises(CacheMismatchError, match="teacher_sha256"):
        dump(dump_options(tmp_path / "t", corpus, out))
    assert files(out) == before


def test_a_folder_of_something_else_is_not_touched(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds no cache but other files, such as thesis\.tex"):
        dump(dump_options(teacher, corpus, tmp_path))
    with pytest.raises(CacheError, match="is a file"):
        dump(dump_options(teacher, corpus, tmp_path / "thesis.tex"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_creation_that_was_killed_goes_on(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """Between its first file and its manifest a cache is a tokenizer, or a part of it."""
    out = tmp_path / "c"
    shutil.copytree(cache / "tokenizer", out / "tokenizer")
    (out / "tokenizer/tokenizer_config.json").unlink()
    assert dump(dump_options(teacher, corpus, out))["complete"]
    assert files(out) == files(cache)


def test_the_tokenizer_of_something_else_is_not_adopted(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "c/tokenizer", size=300)
    with pytest.raises(CacheError, match="of another tokenizer"):
        dump(dump_options(teacher, corpus, tmp_path / "c"))
    (tmp_path / "d/tokenizer").mkdir(parents=True)
    (tmp_path / "d/tokenizer/added.json").write_text("{}")
    with pytest.raises(CacheError, match=r"added\.json is a stray file"):
        dump(dump_options(teacher, corpus, tmp_path / "d"))


def test_a_corpus_with_nothing_to_predict_is_refused(teacher: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"input_ids": [4]}\n{"input_ids": [5]}\n')
    with pytest.raises(CorpusError, match="none of the 2 documents has a token to predict"):
        dump(dump_options(teacher, corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_tokenizer(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(teacher, mute)
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        dump(dump_options(mute, corpus, tmp_path / "out"))


def test_data_of_a_writer_that_stopped_is_not_called_ours(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    dump(dump_options(teacher, corpus, out, dtype="bfloat16"))
    for path in [*(out / "commits").iterdir(), out / "seal.arrow"]:
        path.unlink()
    dump(dump_options(teacher, corpus, out, dtype="float32"))
    assert verify_cache(out).ok
    assert all("unknown" in commit.compute for commit in open_cache(out).commits.values())


def test_a_damaged_manifest_is_named(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    shutil.copytree(cache, out)
    (out / "kdcache.json").write_text("{}")
    with pytest.raises(CacheError, match="its checksum does not match"):
        dump(dump_options(teacher, corpus, out))


def test_settings_are_frozen_and_checked(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = dump_options(teacher, corpus, tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3
    for changes in (
        {"seq_len": 1},
        {"batch_rows": 0},
        {"docs_per_shard": 0},
        {"chars_per_shard": 5},
        {"dtype": "int8"},
        {"device_map": "gpu"},
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(config, **changes)
