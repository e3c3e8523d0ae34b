"""A grown corpus: what another cache holds is copied, and the teacher runs the rest alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.errors import CacheError, CacheMismatchError, ConfigError, KdcacheError
from kdcache.teacher import context_index, shard_maker
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import base
from kdcache.teacher.engines.base import Engine, EngineOutput, Logits, TargetRequest, register_engine
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.engines.transformers import TransformersEngine
from tests.making import TEXTS, dump_options, make_model, make_tokenizer
from tests.objects import Bucket
from tests.processes import ReadyMade, kdcache, wait_until

NEW = "Nobody had told this story before, and it was short."
MIDDLE = [*TEXTS[:50], NEW, *TEXTS[50:]]
"""A corpus of 108 documents, grown by about 1 % in its middle."""

WEIGHTS = 3 * torch.randn(320, 320, generator=torch.Generator().manual_seed(3))


class Exact(Engine):
    """A teacher whose numbers do not depend on the batch by a single bit: each token's logits are looked up."""

    name = "exact"

    def __init__(self, *_: Any) -> None:
        pass

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        return EngineOutput(positions=Logits(WEIGHTS[batch.tokens[batch.slots[:, 0], batch.slots[:, 1]]]))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices are kept; and the engine is known."""
    monkeypatch.setattr(base._ENGINES, "_values", dict(base._ENGINES._values))
    register_engine(Exact)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/kdcache/reuse"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots of each batch that a teacher was given."""
    slots: list[int] = []

    def counting(run: Callable[..., EngineOutput]) -> Callable[..., EngineOutput]:
        def counted(self: Engine, batch: Batch, request: TargetRequest) -> EngineOutput:
            slots.append(batch.tokens.numel())
            return run(self, batch, request)

        return counted

    for engine in (Exact, TransformersEngine):
        monkeypatch.setattr(engine, "run", counting(engine.run))
    return slots


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def taken(ran: list[int]) -> int:
    """What was run since this was asked last."""
    total = sum(ran)
    ran.clear()
    return total


def assert_same_rows(found: Path | str, expected: Path | str, tolerance: float) -> None:
    """Rows are equal, and targets too, but for the order of entries and what a batch changes."""
    one, other = open_cache(found), open_cache(expected)
    assert len(one) == len(other) and verify_cache(found).ok
    for a, b in zip(one, other, strict=True):
        for name in ("tokens", "labels", "segments", "documents"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        counts = [
            (targets.count > 0 if targets.sampled else targets.count).tolist() for targets in (a.targets, b.targets)
        ]
        assert counts[0] == counts[1]  # draws of one id are one entry
        for name in ("entropy", "label_logprob", "log_partition", *([] if a.targets.sampled else ["log_tail"])):
            torch.testing.assert_close(getattr(a.targets, name), getattr(b.targets, name), atol=tolerance, rtol=0)
        for name, values in a.extras.items():
            torch.testing.assert_close(values, b.extras[name], atol=tolerance, rtol=0, equal_nan=True)
        if not a.targets.sampled:  # draws depend on where a position stands
            assert torch.equal(a.targets.ids.sort(-1).values, b.targets.ids.sort(-1).values)
            weights = [targets.weights.gather(-1, targets.ids.argsort(-1)) for targets in (a.targets, b.targets)]
            full = a.targets.count == a.targets.ids.shape[1]  # else padding sorts among the entries
            torch.testing.assert_close(weights[0][full], weights[1][full], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "grown", ["middle", pytest.param("end", marks=pytest.mark.slow), pytest.param("shuffled", marks=pytest.mark.slow)]
)
def test_it_has_the_content_of_a_dump_from_nothing(
    teacher: Path, corpus: Path, tmp_path: Path, ran: list[int], grown: str
) -> None:
    """To the bit, where the teacher's numbers do not depend on the batch."""
    texts = MIDDLE if grown == "middle" else [*TEXTS, NEW]
    if grown == "shuffled":
        random.Random(0).shuffle(texts)
    larger = write(tmp_path / "larger.jsonl", texts)
    dump(dump_options(teacher, corpus, tmp_path / "old", engine="exact"))
    first = taken(ran)
    summary = dump(dump_options(teacher, larger, tmp_path / "new", engine="exact", reuse=(str(tmp_path / "old"),)))
    assert taken(ran) <= 0.05 * first
    assert summary["complete"] and summary["reused"]["documents"] == len(TEXTS)
    new = summary["positions"] - summary["reused"]["positions"]
    assert 0 < new <= 0.02 * summary["positions"]
    dump(dump_options(teacher, larger, tmp_path / "nothing", engine="exact"))
    report = verify_cache(tmp_path / "new")
    assert report.ok and report.content_sha256 == verify_cache(tmp_path / "nothing").content_sha256
    commits = open_cache(tmp_path / "new").commits
    copied = [commits[shard].compute["reused"] for shard in commits]
    assert sum(each["positions"] for each in copied) == summary["reused"]["positions"]
    assert copied[0]["compute"][0]["engine"] == "exact" and "reused" not in copied[0]["compute"][0]
    assert open_cache(tmp_path / "new").manifest.origin["reused"] == [open_cache(tmp_path / "old").manifest.sha256]


@pytest.mark.slow
def test_draws_of_what_is_new_are_those_of_a_dump_from_nothing(
    teacher: Path, corpus: Path, tmp_path: Path, ran: list[int]
) -> None:
    """At the end of a corpus nothing changes its place, so copied and new draws are all those of its places."""
    larger = write(tmp_path / "larger.jsonl", [*TEXTS, NEW])
    ipps: dict[str, Any] = {"engine": "exact", "select": "ipps"}
    dump(dump_options(teacher, corpus, tmp_path / "old", **ipps))
    taken(ran)
    dump(dump_options(teacher, larger, tmp_path / "new", reuse=(str(tmp_path / "old"),), **ipps))
    assert taken(ran) < 100
    dump(dump_options(teacher, larger, tmp_path / "nothing", **ipps))
    assert verify_cache(tmp_path / "new").content_sha256 == verify_cache(tmp_path / "nothing").content_sha256


@pytest.mark.slow
def test_a_real_batch_changes_last_bits_only(teacher: Path, cache: Path, tmp_path: Path, ran: list[int]) -> None:
    larger = write(tmp_path / "larger.jsonl", MIDDLE)
    summary = dump(dump_options(teacher, larger, tmp_path / "new", reuse=(str(cache),)))
    assert summary["entropy_quantiles"] and taken(ran) < 100
    dump(dump_options(teacher, larger, tmp_path / "nothing"))
    assert_same_rows(tmp_path / "new", tmp_path / "nothing", 1e-5)


CASES: list[dict[str, Any]] = [
    {"precision": "6"},
    {"precision": "float16", "store": "zarr"},
    {"precision": "8", "force_label": True},
    {"precision": "6", "select": "ipps", "adaptive": True},
    {"precision": "12", "select": "sample", "draws": 12},
    {"precision": "6", "select": "sample", "draws": 12, "proposal_power": 0.8},
    {"precision": "8", "select": "full"},
    {"precision": "6", "select": "topp", "top_p": 0.4},
    {"precision": "6", "positions": "entropy>5.4"},
    {"precision": "6", "extra": ("hidden:-1",), "extra_precision": "float32"},
    {"precision": "6", "pack": "none"},
    {"precision": "6", "isolate": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_whatever_is_stored(teacher: Path, corpus: Path, tmp_path: Path, ran: list[int], case: dict[str, Any]) -> None:
    larger = write(tmp_path / "larger.jsonl", MIDDLE)
    dump(dump_options(teacher, corpus, tmp_path / "old", **case))
    first = taken(ran)
    reuse = (str(tmp_path / "old"),)
    summary = dump(dump_options(teacher, larger, tmp_path / "new", reuse=reuse, **case))
    most = 0.05 if case.get("isolate", True) else 0.1  # whole rows, many of which hold other documents now
    assert taken(ran) <= most * first and summary["complete"]
    dump(dump_options(teacher, larger, tmp_path / "nothing", **case))
    step = {"float16": 1e-5, "12": 1 / 128, "6": 1 / 128, "8": 1 / 128}[case["precision"]]
    assert_same_rows(tmp_path / "new", tmp_path / "nothing", step)
    assert (summary["entropy_quantiles"] is None) == ("positions" in case)
    old, new = open_cache(tmp_path / "old").manifest, open_cache(tmp_path / "new").manifest
    assert (new.selection, new.id_order, new.date) == (old.selection, old.id_order, old.date)


@pytest.mark.slow
def test_where_everything_is_held_no_teacher_is_opened(
    teacher: Path, corpus: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other shards, rows of another length, another store, and documents of two caches."""
    dump(dump_options(teacher, write(tmp_path / "one.jsonl", [NEW]), tmp_path / "one", docs_per_shard=1))
    larger = write(tmp_path / "larger.jsonl", MIDDLE)
    monkeypatch.setattr(shard_maker, "open_teacher", lambda *_: pytest.fail("it was opened"))
    changes: dict[str, Any] = {"docs_per_shard": 17, "seq_len": 128, "store": "zarr"}
    texts = [text for text in MIDDLE if len(text) < 150]
    larger = write(tmp_path / "larger.jsonl", texts)
    reuse = (str(cache), str(tmp_path / "one"))
    summary = dump(dump_options(teacher, larger, tmp_path / "new", reuse=reuse, **changes))
    assert summary["complete"] and summary["reused"]["documents"] == summary["documents"] == len(texts)
    assert summary["reused"]["positions"] == summary["positions"]
    compute = open_cache(tmp_path / "new").commits[0].compute
    assert "engine" not in compute and compute["reused"]["compute"][0]["engine"] == "transformers"
    monkeypatch.undo()
    dump(dump_options(teacher, larger, tmp_path / "nothing", **changes))
    assert_same_rows(tmp_path / "new", tmp_path / "nothing", 1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 9}, "its selection is {'kind': 'topk', 'k': 8}, not {'kind': 'topk', 'k': 9}"),
        ({"temperatures": "1"}, r"its temperatures are [1.0, 2.0], not [1.0]"),
        ({"precision": "float16"}, "its precision is float32, not float16"),
        ({"positions": "entropy>1"}, "its positions are all, not entropy>1"),
        ({"isolate": False}, "its rows are isolated: True, those of this dump: False"),
        ({"extra": ("hidden:-1",)}, "it does not hold the extra hidden:-1 in this precision"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_cache_of_other_targets_is_refused(
    teacher: Path, corpus: Path, cache: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        dump(dump_options(teacher, corpus, tmp_path / "new", reuse=(str(cache),), **changes))
    assert str(caught.value) == f"{cache} cannot be reused: {words}" and not (tmp_path / "new").exists()


def test_a_cache_of_another_teacher_or_of_fresh_draws_is_refused(
    teacher: Path, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "other")
    make_model(tmp_path / "other", scale=9)
    with pytest.raises(CacheMismatchError, match="it is of another teacher"):
        dump(dump_options(tmp_path / "other", corpus, tmp_path / "new", reuse=(str(cache),)))
    few = {"limit_docs": 3, "select": "ipps", "docs_per_shard": 3}
    dump(dump_options(teacher, corpus, tmp_path / "drawn", **few))
    with pytest.raises(CacheMismatchError, match="its draws have the seed 0, not 1"):
        dump(dump_options(teacher, corpus, tmp_path / "new", seed=1, reuse=(str(tmp_path / "drawn"),), **few))
    with pytest.raises(ConfigError, match="which is the cache that is made"):
        dump(dump_options(teacher, corpus, tmp_path / "drawn", reuse=(str(tmp_path / "drawn"),), **few))
    with pytest.raises(CacheError, match="holds no cache"):
        dump(dump_options(teacher, corpus, tmp_path / "new", reuse=(str(tmp_path / "nowhere"),), **few))


def test_fewer_labels_are_taken_of_all_and_more_are_not(
    teacher: Path, cache: Path, tmp_path: Path, ran: list[int]
) -> None:
    """What was a text is tokens now, of which only some are to be learned; and the other way round."""
    rows = list(open_cache(cache).read_rows(range(10)))
    ids = [row.tokens[: row.piece_lengths[0]].tolist() for row, _ in rows]
    some = [[t if n % 3 else -100 for n, t in enumerate(tokens)] for tokens in ids]
    lines = [json.dumps({"input_ids": a, "labels": b}) for a, b in zip(ids, some, strict=True)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    (tmp_path / "every.jsonl").write_text("\n".join(json.dumps({"input_ids": a}) for a in ids))
    made = {name: tmp_path / f"{name}.jsonl" for name in ("some", "every")}
    summary = dump(dump_options(teacher, made["some"], tmp_path / "some", reuse=(str(cache),)))
    assert not taken(ran) and summary["reused"]["positions"] == summary["labels"] < sum(map(len, ids)) * 0.7
    dump(dump_options(teacher, made["some"], tmp_path / "nothing"))
    assert_same_rows(tmp_path / "some", tmp_path / "nothing", 1e-5)
    taken(ran)
    summary = dump(dump_options(teacher, made["every"], tmp_path / "every", reuse=(str(tmp_path / "some"),)))
    assert taken(ran) and summary["reused"] == {"positions": 0, "documents": 0}


def test_an_index_is_made_once_and_again_where_it_is_damaged(
    teacher: Path, corpus: Path, cache: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_index, "_MOST_WAITING", 50)  # so that parts are in files
    built: list[Path] = []
    build = context_index._build
    monkeypatch.setattr(context_index, "_build", lambda c, path: (built.append(path), build(c, path)))
    few = {"limit_docs": 40, "reuse": (str(cache),)}
    summary = dump(dump_options(teacher, corpus, tmp_path / "a", **few))
    assert summary["reused"]["documents"] == 40 and len(built) == 1
    assert [path.name for path in sorted(home.iterdir())] == [built[0].name, built[0].with_suffix(".lock").name]
    whole = built[0].read_bytes()
    assert dump(dump_options(teacher, corpus, tmp_path / "b", **few))["reused"]["documents"] == 40 and len(built) == 1
    built[0].write_bytes(whole[:1000])
    assert dump(dump_options(teacher, corpus, tmp_path / "c", **few))["reused"]["documents"] == 40 and len(built) == 2
    assert built[0].read_bytes() == whole
    index = context_index.ContextIndex(built[0])
    keys = np.concatenate([np.stack([part["high"], part["low"]], -1) for part in index._parts])
    found = index.find(keys)
    assert len(found) == open_cache(cache).commits.total("pieces") and (found >= 0).all()
    assert (index.find(keys + np.array([0, 1], np.uint64)) == -1).all()


def test_an_index_that_lies_is_refused(
    teacher: Path, corpus: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = context_index.ContextIndex.find
    for wrong in ([0, 1, 0], [0, 0, 1], [99, 0, 0], [0, 10**6, 0]):
        monkeypatch.setattr(context_index.ContextIndex, "find", lambda s, k, w=wrong: find(s, k) + np.array(w))
        with pytest.raises(CacheError, match=r"is not the index of .*; delete it"):
            dump(dump_options(teacher, corpus, tmp_path / "new", limit_docs=40, reuse=(str(cache),)))
        assert not list((tmp_path / "new/commits").glob("*"))


def test_a_damaged_row_is_named(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "old", limit_docs=20))
    shard = tmp_path / "old/shards/00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(KdcacheError, match=r"00000\.arrow, row \d+"):
        dump(dump_options(teacher, corpus, tmp_path / "new", reuse=(str(tmp_path / "old"),)))


@pytest.mark.slow
def test_an_incomplete_cache_gives_what_it_has(teacher: Path, corpus: Path, cache: Path, tmp_path: Path) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "half", worker="1/2"))
    summary = dump(dump_options(teacher, corpus, tmp_path / "new", reuse=(str(tmp_path / "half"),)))
    assert summary["complete"] and summary["reused"]["documents"] == 48
    assert_same_rows(tmp_path / "new", cache, 1e-5)
    dump(dump_options(teacher, corpus, tmp_path / "new", worker="0/1"))  # it is complete, and needs no other


@pytest.mark.slow
def test_workers_side_by_side_one_of_them_killed(teacher: Path, tmp_path: Path) -> None:
    texts = [f"{n}: {text}" for n in range(4) for text in TEXTS]
    old = write(tmp_path / "old.jsonl", texts)
    larger = write(tmp_path / "larger.jsonl", [*texts[:300], *(f"{n}. {NEW}" for n in range(6)), *texts[300:]])

    def command(corpus: Path, out: str, *more: str) -> list[str]:
        return [
            "dump-teacher", "--teacher", str(teacher), "--corpus", str(corpus), "--out", str(tmp_path / out),
            "--seq-len", "64", "--k", "8", "--docs-per-shard", "20", "--device", "cpu", "--json", *more,
        ]  # fmt: skip

    kdcache(*command(old, "old"))
    reuse = ("--reuse", str(tmp_path / "old"))
    killed = ReadyMade("-m", "kdcache_cli", *command(larger, "new", *reuse))
    commits = tmp_path / "new/commits"
    wait_until(lambda: len(list(commits.glob("*.json"))) >= 2, killed, "has no commits", every=0.005)
    time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not verify_cache(tmp_path / "new").ok
    workers = [ReadyMade("-m", "kdcache_cli", *command(larger, "new", *reuse, "--worker", f"{i}/2")) for i in range(2)]
    told = [(*worker.communicate(), worker.returncode) for worker in workers]
    assert [(err, code) for _, err, code in told] == [("", 0)] * 2
    summaries = [json.loads(out) for out, _, _ in told]
    assert all(summary["reused"]["documents"] for summary in summaries)
    alone = json.loads(kdcache(*command(larger, "alone", *reuse)).stdout)
    assert alone["complete"] and alone["reused"]["documents"] == len(texts)
    assert verify_cache(tmp_path / "new").content_sha256 == verify_cache(tmp_path / "alone").content_sha256
    kdcache(*command(larger, "nothing"))
    assert_same_rows(tmp_path / "new", tmp_path / "nothing", 1 / 128)
    shown = kdcache(*command(larger, "shown", *reuse)[:-3], *reuse)  # without --json
    assert shown.returncode == 0 and f"of {len(texts)} documents" in " ".join(shown.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_from_a_bucket_into_a_bucket(
    teacher: Path, corpus: Path, bucket: Bucket, tmp_path: Path, ran: list[int], store: str
) -> None:
    old, new = f"{bucket.url}/{store}-old", f"{bucket.url}/{store}-new"
    larger = write(tmp_path / "larger.jsonl", MIDDLE)
    dump(dump_options(teacher, corpus, old, store=store))
    first = taken(ran)
    summary = dump(dump_options(teacher, larger, new, store=store, reuse=(old,)))
    assert taken(ran) <= 0.05 * first and summary["reused"]["documents"] == len(TEXTS)
    dump(dump_options(teacher, larger, tmp_path / "nothing"))
    assert_same_rows(new, tmp_path / "nothing", 1e-5)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.slow
def test_conversations_and_the_day_that_they_were_written_with(
    teacher: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that names the day makes the same tokens on the next one: the first cache's day holds for all."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + CHAT)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text[:40]}]}
        for n, text in enumerate([*TEXTS, NEW])
    ]
    for name, some in (("old", chats[:-1]), ("larger", [*chats[:30], chats[-1], *chats[30:-1]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in some))
    made = {"chat_template": str(template), "precision": "6", "select": "ipps"}
    dump(dump_options(teacher, tmp_path / "old.jsonl", tmp_path / "old", **made))
    first = taken(ran)
    monkeypatch.setattr("kdcache.teacher.inputs.today", lambda: "2031-01-01")
    summary = dump(
        dump_options(teacher, tmp_path / "larger.jsonl", tmp_path / "new", reuse=(str(tmp_path / "old"),), **made)
    )
    assert taken(ran) <= 0.05 * first and summary["reused"]["documents"] == len(TEXTS)
    monkeypatch.undo()
    dump(dump_options(teacher, tmp_path / "larger.jsonl", tmp_path / "nothing", **made))
    assert_same_rows(tmp_path / "new", tmp_path / "nothing", 1 / 128)
