"""What a run reads: several caches, parts of them, and caches that are still being dumped."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.errors import ConfigError, IncompleteCacheError, TargetError
from kdcache.report.evaluate import evaluate
from kdcache.student import resume, split, trainer
from kdcache.student.caches import open_sources, split_weight
from kdcache.student.config import TrainConfig
from kdcache.student.data import split_heldout
from kdcache.student.train import train
from tests.making import TEXTS, dump_options
from tests.objects import Bucket


def options(caches: Any, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 12, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "save_every": 4, "keep": 3, "device": "cpu",
        "record_rows": True,
    }  # fmt: skip
    named = (str(caches),) if isinstance(caches, Path) else tuple(map(str, caches))
    return TrainConfig(**{**usual, "cache": named, "student": str(student), "out": str(out), **changes})


def taken(out: Path) -> list[list[tuple[int, int]]]:
    """The `(cache, row)` of each step of a run of one rank."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for line in (out / "rows-0.jsonl").read_text().splitlines():
        told = json.loads(line)
        steps.setdefault(told["step"], []).extend((cache, row) for cache, row in told["rows"])
    assert list(steps) == list(range(1, len(steps) + 1))
    return list(steps.values())


def same(one: Path, two: Path) -> bool:
    a, b = (dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()) for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def other(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of other texts by the same teacher, with more entries a position."""
    from kdcache.teacher.dump import dump

    folder = tmp_path_factory.mktemp("other")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in TEXTS[:60]))
    dump(dump_options(teacher, folder / "texts.jsonl", folder / "c", k=11))
    return folder / "c"


@pytest.mark.slow
def test_two_caches_are_each_read_once_an_epoch(cache: Path, other: Path, student_config: Path, tmp_path: Path) -> None:
    config = options([cache, other], student_config, tmp_path / "s", steps=None, epochs=1.0)
    summary = train(config)
    sizes = [len(open_cache(path)) for path in (cache, other)]
    whole = [split_heldout(size, 0.1)[0].tolist() for size in sizes]
    steps = taken(tmp_path / "s")
    counted = Counter(storage for step in steps for storage in step)
    assert set(counted) == {(number, row) for number, rows in enumerate(whole) for row in rows}
    assert summary["steps"] == math.ceil(summary["rows"]["train"] / 4) and sum(counted.values()) == 4 * len(steps)
    share = len(whole[1]) / summary["rows"]["train"]
    assert all(abs(sum(owner for owner, _ in step) - 4 * share) < 1 for step in steps)

    after = summary["heldout"]["after"]
    assert list(after["caches"]) == [str(cache), str(other)]
    for name, figures in after["caches"].items():
        alone = evaluate(str(tmp_path / "s"), name, heldout=0.1, device="cpu")
        assert figures == pytest.approx({key: alone[key] for key in figures}, abs=1e-6)
    for name in ("nll", "kl", "teacher_nll", "top1_agreement"):
        parts = [(figures[name], figures["positions"]) for figures in after["caches"].values()]
        mean = sum(value * positions for value, positions in parts) / after["positions"]
        assert after[name] == pytest.approx(mean, abs=1e-9)
    assert after["kl"] < summary["heldout"]["before"]["kl"] and after["kl_kind"] == "lower-bound"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "kinds", "joined"),
    [
        (({"k": 320}, {"k": 8}), ["dense", "lower-bound"], "lower-bound"),  # 320 is the whole vocabulary
        (({"k": 320}, {"k": 320, "limit_docs": 30}), ["dense", "dense"], "dense"),
        (({"select": "ipps", "k": 8}, {"select": "ipps", "k": 12}), ["estimate", "estimate"], "estimate"),
    ],
    ids=["unlike", "dense", "sampled"],
)
def test_the_kl_of_two_caches_is_of_the_weaker_kind(
    rules: Any, kinds: list[str], joined: str, teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    from kdcache.teacher.dump import dump

    paths = [tmp_path / "c0", tmp_path / "c1"]
    for path, rule in zip(paths, rules, strict=True):
        dump(dump_options(teacher, corpus, path, **{"limit_docs": 40, **rule}))
    after = train(options(paths, student_config, tmp_path / "s", steps=1))["heldout"]["after"]
    assert [figures["kl_kind"] for figures in after["caches"].values()] == kinds
    assert after["kl_kind"] == joined
    assert ("kl_standard_error" in after) == (joined == "estimate") == (after["acceptance_low"] is None)
    assert (after["acceptance"] is None) == (joined != "dense")


@pytest.mark.slow
def test_weights_set_the_shares_and_a_resumed_mixture_is_the_same(
    cache: Path, other: Path, student_config: Path, tmp_path: Path
) -> None:
    config = options([f"{cache}:1", f"{other}:3"], student_config, tmp_path / "s", seed=2)
    summary = train(config)
    assert all(sum(owner for owner, _ in step) == 3 for step in taken(tmp_path / "s"))

    again = shutil.copytree(tmp_path / "s", tmp_path / "again")
    (again / "summary.json").unlink()
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(again / name)
    finer = dataclasses.replace(config, out=str(again), resume=True, batch_rows=2, accumulate=2, save_every=6)
    assert train(finer)["heldout"]["after"]["nll"] == pytest.approx(summary["heldout"]["after"]["nll"], abs=1e-5)
    assert taken(again) == taken(tmp_path / "s")
    assert [path.name for path in trainer.complete(again)] == ["checkpoint-4", "checkpoint-6", "checkpoint-12"]
    with pytest.raises(ConfigError, match=r"differs in caches"):
        train(dataclasses.replace(finer, cache=(f"{cache}:1", f"{other}:2")))
    with pytest.raises(ConfigError, match=r"batch_rows 4 x accumulate 2 x 1 rank\(s\) is 8 rows a step"):
        train(dataclasses.replace(finer, batch_rows=4))


def test_caches_that_cannot_be_mixed(
    cache: Path, other: Path, teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    from kdcache.teacher.dump import dump

    def made(name: str, **changes: Any) -> Path:
        dump(dump_options(teacher, corpus, tmp_path / name, limit_docs=20, **changes))
        return tmp_path / name

    cases = {
        r"differ in seq_len \(64 and 32\)": made("short", seq_len=32),
        r"differ in temperatures \(1,2 and 1\)": made("cold", temperatures="1"),
        r"differ in selection \(topk and full\)": made("full", select="full"),
        r"are one cache; name it once, with a greater weight": shutil.copytree(cache, tmp_path / "copy"),
    }
    for words, path in cases.items():
        with pytest.raises(ConfigError, match=rf"the caches {cache} and {path} .*{words}"):
            open_sources(options([cache, path], student_config, tmp_path / "s"))
    with pytest.raises(ConfigError, match=rf"the caches {other} and {other} are one cache"):
        open_sources(options([cache, other, other], student_config, tmp_path / "s"))
    with pytest.raises(ConfigError, match="needs a weight for every cache, or for none"):
        open_sources(options([cache, f"{other}:2"], student_config, tmp_path / "s"))
    with pytest.raises(ConfigError, match="cache is missing"):
        options([], student_config, tmp_path / "s")


def test_a_weight_is_a_trailing_number_and_a_path_of_that_name_wins(
    cache: Path, bucket: Bucket, tmp_path: Path
) -> None:
    (tmp_path / "c:8").mkdir()
    for spelled, expected in {
        "caches/a": ("caches/a", None),
        "caches/a:0.25": ("caches/a", 0.25),
        "caches/a:v2": ("caches/a:v2", None),
        "caches/a:1:2": ("caches/a:1", 2.0),
        "C:8": ("C:8", None),
        "C:\\caches\\a": ("C:\\caches\\a", None),
        "C:\\caches\\a:3e-1": ("C:\\caches\\a", 0.3),
        f"{tmp_path}/c:8": (f"{tmp_path}/c:8", None),
        f"{tmp_path}/c:8:2": (f"{tmp_path}/c:8", 2.0),
    }.items():
        assert split_weight(spelled) == expected
    plain, numbered = bucket.upload(cache, "c"), bucket.upload(cache, "c:8")
    assert split_weight(plain) == (plain, None)
    assert split_weight(numbered) == (numbered, None) and split_weight(f"{numbered}:2") == (numbered, 2.0)
    assert split_weight(f"{plain}:9") == (plain, 9.0)
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"cache a/b:{wrong} has a weight of {wrong}, but it must be above 0"):
            split_weight(f"a/b:{wrong}")


def entropies(path: Path, rows: list[int]) -> dict[int, float]:
    opened = open_cache(path)
    return {row: opened[row].targets[opened[row].labels != -100].entropy.double().mean().item() for row in rows}


@pytest.mark.parametrize("readers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_and_where(
    ready_readers: None,
    cache: Path,
    other: Path,
    student_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    readers: int,
) -> None:
    sides = [split_heldout(len(open_cache(path)), 0.3) for path in (cache, other)]
    train_rows = [[row for row in side[0].tolist() if row < 15 or row >= 20] for side in sides]
    heldout = [[row for row in side[1].tolist() if row < 15 or row >= 20] for side in sides]
    found = [entropies(path, rows) for path, rows in zip((cache, other), train_rows, strict=True)]
    middle = float(np.median([value for one in found for value in one.values()]))
    expected = [[row for row, value in one.items() if value < middle] for one in found]
    seen: list[tuple[int, int]] = []
    config = options(
        [cache, other], student_config, tmp_path / "s", rows=":15,20:", where=f"entropy<{middle}", heldout=0.3,
        steps=30, save_every=15, readers=readers,
    )  # fmt: skip
    summary = train(config, on_reading=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(map(len, train_rows)), sum(map(len, train_rows)))
    assert {storage for step in taken(tmp_path / "s") for storage in step} == {
        (number, row) for number, rows in enumerate(expected) for row in rows
    }
    assert summary["rows"]["train"] == sum(map(len, expected)) and summary["rows"]["heldout"] == sum(map(len, heldout))
    told = json.loads((tmp_path / "s/train-student.json").read_text())["training_rows"]
    assert told == {"count": summary["rows"]["train"], "sha256": summary["rows"]["train_sha256"]}
    if readers:
        return

    other_way = options([cache, other], student_config, tmp_path / "t", rows=":15,20:", heldout=0.3, steps=1)
    whole = train(other_way)
    assert whole["heldout"]["before"] == summary["heldout"]["before"]  # --where leaves what is measured alone
    assert whole["rows"]["train_sha256"] != told["sha256"]

    (tmp_path / "s/summary.json").unlink()
    shutil.rmtree(tmp_path / "s/checkpoint-30")
    again = dataclasses.replace(config, resume=True)
    monkeypatch.setattr(split, "mean_entropies", None)  # what came of the first reading is not read again
    assert train(again)["heldout"] == summary["heldout"]
    (tmp_path / "s/summary.json").unlink()
    with np.load(tmp_path / "s/rows.npz") as kept:
        bits = dict(kept)
    bits["0"][0] ^= 2
    np.savez(tmp_path / "s/rows.npz", **bits)
    with pytest.raises(ConfigError, match=r"its rows\.npz was changed; delete that file"):
        train(again)
    monkeypatch.undo()
    (tmp_path / "s/rows.npz").write_bytes(b"half a fi")
    assert train(again)["heldout"] == summary["heldout"]


def test_rows_that_leave_nothing_are_refused(cache: Path, student_config: Path, tmp_path: Path) -> None:
    count = len(open_cache(cache))
    held = split_heldout(count, 0.1)[1].tolist()
    for rows, words in {
        f"{count}:": rf"rows {count}: leaves 0 of {count - len(held)} rows to train on and 0 of {len(held)} held-out",
        f"{held[0]}:{held[0] + 1}": r"leaves 0 of .* rows to train on and 1 of",
    }.items():
        with pytest.raises(ConfigError, match=words):
            train(options(cache, student_config, tmp_path / "s", rows=rows))
    with pytest.raises(ConfigError, match=rf"where entropy<0 leaves no row of {cache} to train on"):
        train(options(cache, student_config, tmp_path / "s", where="entropy<0"))
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_cache_that_is_still_being_dumped(cache: Path, student_config: Path, tmp_path: Path) -> None:
    growing = shutil.copytree(cache, tmp_path / "c")
    commit = growing / "commits/00001.json"
    sealed = commit.read_bytes()
    commit.unlink()
    (growing / "seal.arrow").unlink()
    with pytest.raises(IncompleteCacheError, match=r"1 of 4 shards are missing; .*, or give partial=True to train on"):
        train(options(growing, student_config, tmp_path / "s"))
    config = options(growing, student_config, tmp_path / "s", partial=True)
    summary = train(config)
    some = [commit.rows for shard, commit in open_cache(cache).commits.items() if shard != 1]
    assert summary["rows"]["train"] + summary["rows"]["heldout"] == sum(some)
    told = json.loads((tmp_path / "s/train-student.json").read_text())
    assert told["caches"][0]["shards"] == [0, 2, 3]

    again = shutil.copytree(tmp_path / "s", tmp_path / "again")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoint-12")
    commit.write_bytes(sealed)  # the dump goes on, but the run keeps to what it began with
    assert train(dataclasses.replace(config, out=str(again), resume=True))["heldout"] == summary["heldout"]
    assert same(again, tmp_path / "s") and taken(again) == taken(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"differs in partial \(was True, now False\)"):
        train(dataclasses.replace(config, resume=True, partial=False))

    (growing / "commits/00002.json").unlink()
    (again / "summary.json").unlink()
    with pytest.raises(IncompleteCacheError, match="has no committed shard 2"):
        train(dataclasses.replace(config, out=str(again), resume=True))


@pytest.mark.slow
def test_the_wait_for_rows_is_told(cache: Path, student_config: Path, tmp_path: Path) -> None:
    summary = train(options(cache, student_config, tmp_path / "s"))
    assert 0 < summary["data_wait_share"] < 1
    lines = [json.loads(line) for line in (tmp_path / "s/metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_share"] for line in lines if "loss" in line]
    assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:])  # the first batch is the start of the loader


def test_targets_are_widened_and_never_narrowed(cache: Path, other: Path) -> None:
    narrow, wide = open_cache(cache)[0].targets, open_cache(other)[0].targets
    widened = narrow.widen(wide.ids.shape[-1])
    joined = type(wide).cat([widened, wide])
    assert joined.ids.shape[-1] == 11
    assert torch.equal(widened.ids[:, :8], narrow.ids) and not widened.ids[:, 8:].any()
    assert (widened.logprobs[:, 8:] == -torch.inf).all() and not widened.weights[:, 8:].any()
    assert torch.equal(widened.valid[:, :8], narrow.valid) and not widened.valid[:, 8:].any()
    with pytest.raises(TargetError, match="targets of 11 entries a position have no room in 8"):
        wide.widen(8)


def test_a_cache_of_some_shards(cache: Path) -> None:
    opened = open_cache(cache)
    part = opened.only([2, 0])
    first = opened.commits[0].rows
    assert len(part) == first + opened.commits[2].rows and part.missing() == [1, 3]
    assert torch.equal(part[first].tokens, opened[opened.index(2, 0)].tokens)
    with pytest.raises(IncompleteCacheError, match="no committed shard 9"):
        opened.only([9])


def test_a_folder_that_another_run_writes_is_refused(cache: Path, student_config: Path, tmp_path: Path) -> None:
    config = options(cache, student_config, tmp_path / "s", steps=1)
    refused = pytest.raises(ConfigError, match="is being written by another run; wait until it ends, or end it")
    with (
        resume.hold_folder(tmp_path / "s"),
        refused,
    ):  # a lock belongs to an opening, so this stands for another process
        train(config)
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    with pytest.raises(ConfigError, match="cache is missing"), resume.hold_folder(tmp_path / "s"):
        options([], student_config, tmp_path / "s")
    assert (tmp_path / "s").exists()  # it was there before
    assert train(config)["steps"] == 1


@pytest.mark.slow
def test_a_cache_at_a_url_beside_one_in_a_folder(
    cache: Path, other: Path, bucket: Bucket, student_config: Path, tmp_path: Path
) -> None:
    """Which of them is copied: the one that is far. What is trained: the same."""
    here = train(options([cache, other], student_config, tmp_path / "here", steps=3))
    url, copies = bucket.upload(other, "c"), str(tmp_path / "copies")
    there = train(options([cache, url], student_config, tmp_path / "there", steps=3, local_copy=copies, readers=0))
    assert same(tmp_path / "here", tmp_path / "there") and taken(tmp_path / "here") == taken(tmp_path / "there")
    assert list(there["heldout"]["after"]["caches"].values()) == list(here["heldout"]["after"]["caches"].values())
    assert any(path.is_file() for path in Path(copies).rglob("*"))
