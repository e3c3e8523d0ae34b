"""A student of several teachers: it learns from all, figures tell them apart, what does not line up is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from kdcache import Pool, open_cache
from kdcache.errors import ConfigError, IncompleteCacheError, KdcacheError, TargetError
from kdcache.isolation import packed_forward
from kdcache.losses import target_losses
from kdcache.rows import PackedRow
from kdcache.store.commits import Commits
from kdcache.student.config import TrainConfig
from kdcache.student.data import Collator, RowDataset, RunOrder, labelled, split_heldout
from kdcache.student.data_workers import _ByValue
from kdcache.student.evaluation import measure
from kdcache.student.mixture import Mixture
from kdcache.student.multi_teacher import PooledCache, TeacherCache, require_lined_up
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model
from tests.processes import kdcache

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "full": {"select": "full"},
    "ipps": {"select": "ipps", "temperatures": "1"},
}
Caches = Callable[[str], tuple[Path, Path]]


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(target_losses, "_warned", {"pool"})
    yield


@pytest.fixture(scope="module")
def other(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher: the same tokenizer, another body and other weights."""
    folder = tmp_path_factory.mktemp("other") / "t"
    shutil.copytree(teacher, folder)
    make_model(folder, scale=4.0, hidden_size=48, intermediate_size=80, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def caches(teacher: Path, other: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """Both teachers' caches by kind of target. The second is of another store, precision and number of entries."""
    folder = tmp_path_factory.mktemp("caches")
    made: dict[str, tuple[Path, Path]] = {}

    def both(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = folder / f"{kind}-1", folder / f"{kind}-2"
            rule = KINDS[kind]
            dump(dump_options(teacher, corpus, made[kind][0], **rule))
            more = {"k": 12} if kind == "topk" else {}
            dump(
                dump_options(other, corpus, made[kind][1], **{**rule, **more, "store": "zarr", "precision": "float16"})
            )
        return made[kind]

    return both


def options(caches: tuple[Path, Path], student: Path, out: Path, weight: str = "", **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "cache": str(caches[0]), "pool": f"{caches[1]}{weight}", "student": str(student), "out": str(out), "steps": 12,
        "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "save_every": 4, "device": "cpu", "soft_weight": 0.9,
    }  # fmt: skip
    return TrainConfig(**{**usual, **changes})


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "data_wait_share"} for line in lines]


def pooled(caches: tuple[Path, Path], weights: tuple[float, float] = (1.0, 1.0)) -> PooledCache:
    return PooledCache([TeacherCache(str(c), open_cache(c), w) for c, w in zip(caches, weights, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_comes_nearer_to_both_teachers(
    kind: str, caches: Caches, student_config: Path, tmp_path: Path
) -> None:
    both, out = caches(kind), tmp_path / "s"
    summary = train(options(both, student_config, out, ":3", eval_every=6))
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert [each["cache"] for each in after["teachers"]] == [str(path) for path in both]
    assert [each["weight"] for each in after["teachers"]] == [0.25, 0.75]
    for old, new, path in zip(before["teachers"], after["teachers"], both, strict=True):
        assert new["kl"] < old["kl"] - 0.005 and new["teacher_nll"] == old["teacher_nll"]
        cache = open_cache(path)
        model = AutoModelForCausalLM.from_pretrained(out)
        alone = measure(model, cache, split_heldout(len(cache), 0.1)[1], torch.device("cpu"))
        for name in ("kl", "kl_kind", "teacher_nll", "kl_standard_error", "targets"):
            assert new.get(name) == (pytest.approx(alone[name], abs=1e-6) if name in alone else None), name
    assert after["kl"] == after["teachers"][0]["kl"] and after["nll"] < before["nll"]
    lines = metrics(out)
    assert [len(line["heldout"]["teachers"]) for line in lines if "heldout" in line] == [2, 2]
    logged = [line["kl/2"] for line in lines if "kl/2" in line]
    assert len(logged) > 2 and logged[-1] < logged[0]


def test_the_loss_of_a_step_is_the_divergence_from_the_pool(
    caches: Caches, student_config: Path, tmp_path: Path
) -> None:
    """From each cache's own reader, with everything kept: reverse KL to the pool of softened teachers, by hand."""
    both, t = caches("full"), 2.0
    changes: dict[str, Any] = {"loss": "reverse-kl", "temperature": t, "soft_weight": 1.0, "steps": 1, "accumulate": 2}
    train(options(both, student_config, tmp_path / "s", ":3", **changes))
    logged = metrics(tmp_path / "s")[0]["loss"]
    rows = split_heldout(len(open_cache(both[0])), 0.1)[0]
    p, weights = torch.zeros(()), (0.25, 0.75)
    for path, weight in zip(both, weights, strict=True):
        cache = open_cache(path)
        data = RowDataset([cache], [rows])
        batch = Collator([cache])([data[i] for i in RunOrder(Mixture([len(rows)], 0), 8)])
        targets = batch["targets"]
        log_p = torch.zeros(targets.ids.shape, dtype=torch.float64)
        log_p.scatter_(-1, targets.ids.long(), targets.logprobs.double())
        p = p + weight * (log_p / t).softmax(-1)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(student_config)))
    with torch.no_grad():
        logits = packed_forward(model, batch["input_ids"], batch["position_ids"]).logits[labelled(batch)][:, :320]
    log_q = (logits.double() / t).log_softmax(-1)
    exact = t**2 * (log_q.exp() * (log_q - p.log())).sum(-1).mean().item()
    assert logged == pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
def test_a_pool_does_not_depend_on_who_is_named_first(caches: Caches, student_config: Path, tmp_path: Path) -> None:
    one, two = caches("full")
    runs = [
        train(options((one, two), student_config, tmp_path / "a", ":3", temperature=2)),
        train(options((two, one), student_config, tmp_path / "b", cache=f"{two}:3", temperature=2)),
    ]
    first, second = (run["heldout"]["after"]["teachers"] for run in runs)
    for name in ("kl", "weight", "teacher_nll", "cache"):
        mine, theirs = [each[name] for each in first], [each[name] for each in reversed(second)]
        assert mine == (theirs if name == "cache" else pytest.approx(theirs, abs=1e-3)), name


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(caches: Caches, student_config: Path, tmp_path: Path) -> None:
    both, out = caches("ipps"), tmp_path / "s"
    whole = train(options(both, student_config, out, ":2"))
    kept = metrics(out)
    shutil.rmtree(out / "checkpoint-12")
    (out / "summary.json").unlink()
    moved = both[0], tmp_path / "moved"
    shutil.copytree(both[1], moved[1])  # where a cache lies may change
    again = train(options(moved, student_config, out, ":2", resume=True))
    for one, two in zip(again["heldout"]["after"]["teachers"], whole["heldout"]["after"]["teachers"], strict=True):
        assert {**one, "cache": ""} == {**two, "cache": ""}
    assert metrics(out) == kept
    for config in (
        options(both, student_config, out, ":3", resume=True),
        options(both, student_config, out, resume=True, pool=()),
        options((both[1], both[0]), student_config, out, ":2", resume=True),
    ):
        with pytest.raises(ConfigError, match="a run of another configuration; it differs in caches"):
            train(config)


@pytest.mark.slow
def test_readers_bring_the_same_pools(
    ready_readers: None, caches: Caches, student_config: Path, tmp_path: Path
) -> None:
    both = caches("topk")
    one = train(options(both, student_config, tmp_path / "a", steps=4))
    two = train(options(both, student_config, tmp_path / "b", steps=4, readers=1))
    assert one["heldout"] == two["heldout"] and metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_pool_travels_between_processes(caches: Caches) -> None:
    cache = pooled(caches("topk"), (1.0, 3.0))
    batch = Collator([cache])(RowDataset([cache], [[3, 1]]).__getitems__([0, 1]))
    back = pickle.loads(pickle.dumps(_ByValue(batch)))
    assert isinstance(back["targets"], Pool) and back["targets"].weights == (0.25, 0.75)
    for sent, arrived in zip(batch["targets"].targets, back["targets"].targets, strict=True):
        assert torch.equal(sent.ids, arrived.ids) and torch.equal(sent.logprobs, arrived.logprobs)
    widths = [targets.ids.shape[-1] for targets in batch["targets"].targets]
    assert widths == [8, 12] and len(batch["targets"].count) == labelled(batch).sum()
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.read_packed(5)[1].targets[1].ids, cache.read_packed(5)[1].targets[1].ids)


def test_shards_that_every_teacher_has(caches: Caches, student_config: Path, tmp_path: Path) -> None:
    first, second = caches("topk")
    short = tmp_path / "short"
    shutil.copytree(second, short)
    (short / "commits/00001.json").unlink()
    (short / "seal.arrow").unlink()
    config = options((first, short), student_config, tmp_path / "s", steps=2)
    with pytest.raises(IncompleteCacheError, match="or give partial=True"):
        train(config)
    assert not (tmp_path / "s").exists()
    summary = train(dataclasses.replace(config, partial=True))
    left = open_cache(first).only({0, 2, 3} & set(open_cache(first).commits))
    assert summary["rows"]["train"] + summary["rows"]["heldout"] == len(left)


@pytest.mark.slow
def test_a_teacher_may_choose_its_positions(
    caches: Caches, other: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    """Where only one has a target the other's weight is nobody's; figures are over what each has."""
    first, whole = caches("topk")
    entropies = torch.cat([targets.entropy for _, targets in open_cache(whole).read_rows(range(20))])
    rule = f"entropy>{entropies.median():.3f}"
    second = other_dump(other, corpus, tmp_path / "c", positions=rule, k=12)
    config = options((first, second), student_config, tmp_path / "s", ":3", steps=1, soft_weight=1.0)
    after = train(config)["heldout"]["after"]
    assert after["targets"] == after["teachers"][0]["targets"] == after["positions"]
    assert 0.2 < after["teachers"][1]["targets"] / after["positions"] < 0.8
    cache, model = open_cache(second), AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    alone = measure(model, cache, split_heldout(len(cache), 0.1)[1], torch.device("cpu"))
    for name in ("kl", "teacher_nll", "targets"):
        assert after["teachers"][1][name] == pytest.approx(alone[name], rel=5e-6), name
    line = metrics(tmp_path / "s")[0]
    rows = split_heldout(len(open_cache(first)), 0.1)[0]
    pool = pooled((first, second), (1.0, 3.0))
    data = RowDataset([pool], [rows])
    targets = Collator([pool])([data[i] for i in RunOrder(Mixture([len(rows)], 0), 4)])["targets"]
    share = (targets.targets[1].count > 0).double().mean().item()
    assert 0.2 < share < 0.8  # the loss is that of a step of all positions; kl/2 is a mean over the second's own
    assert line["loss"] == pytest.approx(0.25 * line["kl"] + 0.75 * share * line["kl/2"], rel=1e-5)


def other_dump(teacher: Path, corpus: Path, out: Path, **changes: Any) -> Path:
    dump(dump_options(teacher, corpus, out, **changes))
    return out


@pytest.mark.slow
def test_what_does_not_line_up_is_refused(
    caches: Caches, other: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    first, second = caches("topk")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(line + "\n" for line in corpus.read_text().splitlines()[:-1]))
    out = tmp_path / "s"
    made = {
        "seq_len": other_dump(other, corpus, tmp_path / "1", seq_len=48),
        "shards": other_dump(other, corpus, tmp_path / "2", docs_per_shard=20),
        "corpus": other_dump(other, fewer, tmp_path / "3"),
        "isolate": other_dump(other, corpus, tmp_path / "4", isolate=False),
        "filters": other_dump(other, corpus, tmp_path / "5", min_chars=60),
    }
    for what, path in made.items():
        with pytest.raises(ConfigError, match=f"{first} and {path} cannot be pooled: they differ in .*{what} \\("):
            train(options((first, path), student_config, out))
    cases: tuple[tuple[TrainConfig, type[KdcacheError], str], ...] = (
        (options((first, first), student_config, out), ConfigError, "are one cache"),
        (options((first, second), student_config, out, pool=(str(second), str(second))), ConfigError, "are one cache"),
        (options((first, caches("ipps")[1]), student_config, out), ConfigError, "topk and ipps targets cannot be pool"),
        (options((first, second), student_config, out, ":0"), ConfigError, "pool .*:0 has a weight of 0"),
        (
            options((first, other_dump(other, corpus, tmp_path / "6", temperatures="1")), student_config, out,
                    temperature=2),
            ConfigError, f"temperature 2 is not exact: {tmp_path / '6'} stores temperature",
        ),
        (options(caches("ipps"), student_config, out, loss="jsd"), TargetError, "loss 'jsd' needs the teacher's"),
    )  # fmt: skip
    for config, error, words in cases:
        with pytest.raises(error, match=words):
            train(config)
    with pytest.raises(ConfigError, match="pool needs one cache, not 2"):
        options((first, second), student_config, out, cache=(str(first), str(second)))
    assert not out.exists()


def test_the_first_shard_that_differs_is_named(caches: Caches) -> None:
    one, two = (TeacherCache(str(path), open_cache(path), 1.0) for path in caches("topk"))
    require_lined_up(one, two)
    commits = two.cache.commits
    assert len(commits) > 1

    def changed(**fields: Any) -> TeacherCache:
        partner = open_cache(two.name)
        other = {**commits, 1: dataclasses.replace(commits[1], **fields)}
        partner.commits = Commits.of(other.values(), partner.manifest.sha256)
        return dataclasses.replace(two, cache=partner)

    require_lined_up(one, changed(positions=7))  # a teacher may choose its positions
    with pytest.raises(ConfigError, match="shard 1 is the first to hold other tokens"):
        require_lined_up(one, changed(tokens_sha256="0" * 64))
    with pytest.raises(ConfigError, match="the second has no shard 1"):
        require_lined_up(one, dataclasses.replace(two, cache=two.cache.only({0})))


def test_other_labels_of_the_same_tokens_are_refused_as_they_are_read(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a chat template can make them: the same tokens, another share of them the assistant's."""
    cache = pooled(caches("topk"))
    second, inner = cache.teachers[1].cache, type(cache.teachers[1].cache).read_packed
    masks: dict[str, Any] = {"first": None, "second": None}

    def read(self: Any, index: int) -> tuple[PackedRow, Any]:
        row, targets = inner(self, index)
        mask = masks["second" if self is second else "first"]
        return dataclasses.replace(row, supervised=None if mask is None else np.full(len(row.tokens), mask)), targets

    monkeypatch.setattr(type(second), "read_packed", read)
    for one, two in ((None, None), (True, True), (None, False), (True, False)):
        masks.update(first=one, second=two)
        if one == two:
            cache.read_packed(4)
            continue
        with pytest.raises(ConfigError, match=r"row 4 of .* have other labels"):
            cache.read_packed(4)
        with pytest.raises(ConfigError, match=r"row 4 of .* have other labels"):
            list(cache.read_rows([4]))


def test_temperatures_step_through_what_all_teachers_store(
    caches: Caches, other: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    from kdcache.student.schedule import Schedule

    three = open_cache(other_dump(other, corpus, tmp_path / "c", temperatures="1,1.5,2")).manifest
    first = open_cache(caches("topk")[0]).manifest
    config = options(caches("topk"), student_config, tmp_path / "s", temperature="2:1")
    for one, two, ladder in ((first, three, [2, 1]), (three, first, [2, 1]), (three, three, [2, 1.5, 1])):
        assert [stair.temperature for stair in Schedule.of(config, one, 4, {"other": two}).stairs] == ladder


@pytest.mark.slow
def test_the_command(caches: Caches, student_config: Path, tmp_path: Path) -> None:
    first, second = caches("topk")
    usual = ("train-student", "--cache", first, "--student", student_config, "--steps", 2, "--batch-rows", 2,
             "--heldout", 0.1, "--device", "cpu")  # fmt: skip
    toml = tmp_path / "c.toml"
    toml.write_text(f'pool = ["{second}:3"]\n')
    done = kdcache(*usual, "--out", tmp_path / "s", "--config", toml, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the optimum is not the pool's") == 1
    after = json.loads(done.stdout)["heldout"]["after"]
    assert [each["weight"] for each in after["teachers"]] == [0.25, 0.75]
    refused = kdcache(*usual, "--out", tmp_path / "u", "--pool", first)
    assert refused.returncode == 2 and "are one cache" in refused.stderr and not (tmp_path / "u").exists()


def test_a_truncated_pool_says_once_that_it_is_none(
    caches: Caches, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_losses, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(options(caches("topk"), student_config, tmp_path / "s", steps=2))
    assert sum("the optimum is not the pool's" in str(one.message) for one in caught) == 1
