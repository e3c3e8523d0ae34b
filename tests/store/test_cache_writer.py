"""The public writer: what it takes, what it refuses, and what a reader sees while it writes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import CacheWriter, Prefix, Selection, SparseTargets, create_cache, open_cache, select, verify_cache
from kdcache.errors import CacheMismatchError, ConfigError, ModelError, TargetError
from kdcache.extras import ExtraSpec
from kdcache.known import Known
from kdcache.testing.example_rows import everything
from tests.teacher.test_dump import files

RULE = Selection(kind="topk", k=4)
VOCAB, LENGTH = 50, 12


def writer(path: Path, **changes: Any) -> CacheWriter:
    options: dict[str, Any] = {
        "vocab_size": VOCAB, "seq_len": LENGTH, "selection": RULE, "shards": 3, "teacher": "t", "temperatures": (1.0,
        2.0), "precision": "float32",
    }  # fmt: skip
    return create_cache(path, **{**options, **changes})


def some(
    tokens: int = 10, seed: int = 0, rule: Selection = RULE, positions: int | None = None
) -> tuple[Any, SparseTargets]:
    """Tokens, and a target for every slot or for so many positions."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (tokens,), generator=g)
    logits = 3 * torch.randn(tokens if positions is None else positions, VOCAB, generator=g)
    labels = torch.randint(0, VOCAB, (len(logits),), generator=g)
    return ids.numpy(), select(logits, rule, labels=labels, temperatures=(1.0, 2.0))


def write_all(made: CacheWriter) -> None:
    for number in made.missing():
        with made.shard(number) as shard:
            for seed in range(2):
                shard.write(*some(seed=10 * number + seed))


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_what_is_written_is_read(tmp_path: Path, store: str) -> None:
    """Targets of every slot, or of the labelled ones; two pieces; a mask, as labels and as flags."""
    made = writer(tmp_path / "c", store=store, documents=30, extras={"h": ExtraSpec(width=3)}, shards=1)
    tokens, targets = some(10)
    mask = np.array([True] * 4 + [False] + [True] * 5)
    labels = np.append(tokens[1:], -100)
    labels[[3, 5]] = -100  # token 4 is none, and token 6 begins a piece
    extra = {"h": torch.arange(30.0).reshape(10, 3)}
    pieces: dict[str, Any] = {"piece_lengths": [6, 4], "documents": [7, 29], "extras": extra}
    kept = torch.from_numpy(np.flatnonzero(labels != -100))
    with made.shard(0) as shard:
        shard.compute = {"machine": "mine"}
        shard.write(tokens, targets, labels=labels, **pieces)
        shard.write(tokens, targets[kept], supervised=mask, **pieces)
        shard.write(tokens.astype(np.uint8), targets, labels=np.append(labels, [-100, -100]), **pieces)
        assert (shard.rows, shard.labels) == (3, 3 * len(kept))
    assert shard.committed and made.missing() == []
    summary = made.finish()
    assert summary["complete"] and summary["labels"] == 3 * len(kept) and summary["documents"] == 30
    assert verify_cache(tmp_path / "c").ok
    cache = open_cache(tmp_path / "c")
    assert cache.commits[0].compute == {"machine": "mine"}
    for read in cache:
        assert read.labels.tolist() == [*labels.tolist(), -100, -100]
        assert read.tokens.tolist() == [*tokens.tolist(), 0, 0] and read.documents.tolist() == [7, 29]
        assert read.segments.tolist() == [0] * 6 + [1] * 4 + [-1] * 2
        assert torch.equal(read.extras["h"][:10], extra["h"])
        for name in ("ids", "logprobs", "weights", "entropy", "label_logprob", "log_tail", "log_partition"):
            torch.testing.assert_close(getattr(read.targets[kept], name), getattr(targets[kept], name).to(
                getattr(read.targets, name).dtype), atol=1e-6, rtol=1e-6)  # fmt: skip


def test_committed_shards_are_skipped_and_the_same_arguments_go_on(tmp_path: Path) -> None:
    one = writer(tmp_path / "c")
    with one.shard(1) as shard:
        shard.write(*some(seed=10))
        shard.write(*some(seed=11))
    again = writer(tmp_path / "c", origin={"note": "another day"})
    assert again.missing() == [0, 2] and again.manifest == one.manifest
    before = files(tmp_path / "c")
    with again.shard(1) as shard:
        shard.write(*some(seed=5))
    assert not shard.committed and files(tmp_path / "c") == before
    write_all(again)
    write_all(writer(tmp_path / "d"))
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_two_writers_of_a_shard_leave_one_commit(tmp_path: Path) -> None:
    one, two = writer(tmp_path / "c", shards=1), writer(tmp_path / "c", shards=1)
    with one.shard(0) as first:
        first.write(*some(seed=1))
        with two.shard(0) as second:
            second.write(*some(seed=2))
        assert second.committed
    assert not first.committed
    one.finish()
    assert verify_cache(tmp_path / "c").ok and len(everything(one.storage)) == 4  # with the seal
    assert open_cache(tmp_path / "c")[0].tokens[:10].tolist() == some(seed=2)[0].tolist()


def test_targets_of_a_server_know_less(tmp_path: Path) -> None:
    """Entries from `from_topk`: no entropy; where the cache is to know it, they are refused."""
    tokens, whole = some()
    targets = SparseTargets.from_topk(whole.ids, whole.logprobs)
    known = Known(entropy=False, label_logprob=False, tails=(1.0,), tail_sum="remainder")
    made = writer(tmp_path / "c", shards=1, temperatures=(1.0,), known=known)
    with made.shard(0) as shard:
        shard.write(tokens, targets)
    assert made.finish()["entropy_quantiles"] is None and verify_cache(tmp_path / "c").ok
    row = open_cache(tmp_path / "c")[0]
    assert row.targets.entropy is None and torch.equal(row.targets.ids[:9], targets.ids[:9].to(row.targets.ids.dtype))
    other = writer(tmp_path / "d", shards=1, temperatures=(1.0,))
    with pytest.raises(TargetError, match="row 0 of shard 0 has no entropy"), other.shard(0) as shard:
        shard.write(tokens, targets)


def test_an_exception_leaves_its_reason_alone(tmp_path: Path) -> None:
    made = writer(tmp_path / "c")
    with pytest.raises(ZeroDivisionError), made.shard(0) as shard:
        shard.write(*some())
        _ = 1 / 0
    assert made.missing() == [0, 1, 2] and list(files(tmp_path / "c")) == ["kdcache.json", "running/00000.json"]


KILLED = """
import os, sys
from tests.store.test_cache_writer import some, writer
from pathlib import Path
made = writer(Path(sys.argv[1]))
with made.shard(0) as shard:
    shard.write(*some())
with made.shard(1) as shard:
    for seed in range(100):
        shard.write(*some(seed=seed))
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_its_whole_shards(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(open_cache(tmp_path / "c", partial=True)) == 1
    made = writer(tmp_path / "c")
    assert made.missing() == [1, 2]
    for path in (tmp_path / "c/shards").iterdir():
        os.utime(path, (0, 0))  # what a dead writer left is deleted when it is old enough
    write_all(made)
    assert made.finish()["complete"] and verify_cache(tmp_path / "c").ok
    assert sorted(p.name for p in (tmp_path / "c/shards").iterdir()) == [f"0000{i}.arrow" for i in range(3)]


def test_positions_that_are_not_chosen_are_dropped(tmp_path: Path) -> None:
    made = writer(tmp_path / "c", positions="entropy>2", shards=1)
    tokens, targets = some()
    with made.shard(0) as shard:
        shard.write(tokens, targets)
    kept = open_cache(tmp_path / "c")[0].targets.count[:9] > 0
    assert torch.equal(kept, targets.entropy[:9] > 2) and 0 < kept.sum() < 9
    assert made.finish()["labels"] == 9


BAD: dict[str, tuple[type[Exception], str, Callable[[Any, Any], dict[str, Any]]]] = {
    "no token": (ConfigError, "row 1 of shard 2 has 0 tokens, but must have 1 to 12", lambda t, x: {"tokens": t[:0]}),
    "long": (ConfigError, "has 13 tokens", lambda t, x: {"tokens": np.zeros(13, int)}),
    "foreign": (ConfigError, "a token outside the vocabulary of 50", lambda t, x: {"tokens": t + 50}),
    "float": (ConfigError, "has tokens float64 of shape", lambda t, x: {"tokens": t / 2}),
    "square": (ConfigError, r"has tokens int64 of shape \(2, 5\)", lambda t, x: {"tokens": t.reshape(2, 5)}),
    "pieces": (ConfigError, "has pieces of 9 tokens together, but 10", lambda t, x: {"piece_lengths": [4, 5]}),
    "empty piece": (ConfigError, "has pieces of 10 tokens", lambda t, x: {"piece_lengths": [0, 10]}),
    "no pieces": (ConfigError, "has pieces of 0 tokens", lambda t, x: {"piece_lengths": np.zeros(0, int)}),
    "documents": (ConfigError, "one document of the 3 for each of 1", lambda t, x: {"documents": [3]}),
    "more documents": (ConfigError, "one document of the 3 for each of 1", lambda t, x: {"documents": [0, 1]}),
    "shifted": (ConfigError, "has the label .* at slot 0, which does not follow there", lambda t, x: {"labels": t}),
    "short mask": (ConfigError, r"has supervised bool of shape \(9,\)", lambda t, x: {"supervised": np.ones(9, bool)}),
    "both": (ConfigError, "both labels and supervised", lambda t, x: {"labels": t, "supervised": t > 0}),
    "few targets": (TargetError, r"targets of shape \(8,\) for 9 labelled slots", lambda t, x: {"targets": x[:8]}),
    "other kind": (TargetError, "targets of kind topp", lambda t, x: {"targets": dataclasses.replace(x, kind="topp")}),
    "wide": (TargetError, "targets of width 5, but 4 is asked", lambda t, x: {"targets": x.widen(5)}),
    "NaN": (
        TargetError, "row 1 of shard 2 has at slot 3 a weight that is not finite",
        lambda t, x: {"targets": dataclasses.replace(x, weights=x.weights.index_fill(0, torch.tensor(3), torch.nan))},
    ),
    "no extra": (TargetError, "a row comes with the extras h", lambda t, x: {"extras": {"h": torch.zeros(10, 2)}}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_are_one_sentence(tmp_path: Path, case: str) -> None:
    error, words, change = BAD[case]
    made, (tokens, targets) = writer(tmp_path / "c"), some()
    with pytest.raises(error, match=words) as caught, made.shard(2) as shard:
        shard.write(tokens, targets)
        shard.write(**{"tokens": tokens, "targets": targets, **change(tokens, targets)})
    assert "\n" not in str(caught.value) and made.missing() == [0, 1, 2]


TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "too few": ("row 0 of shard 2 has 1 prefixes for 2 pieces", {"prefixes": [None]}),
    "foreign": ("has in prefix 1 a token outside the vocabulary of 50", {"prefixes": [None, Prefix(tokens=[50])]}),
    "float": ("has prefix 0 float64 of shape", {"prefixes": [Prefix(tokens=[0.5]), None]}),
    "all replaced": ("has 4 tokens replaced in piece 1, which has 4", {"prefixes": [None, Prefix([1], replaced=4)]}),
    "less than none": ("has -1 tokens replaced in piece 0", {"prefixes": [Prefix([1], replaced=-1), None]}),
    "long": ("piece 0 for which the teacher reads 15 tokens, above", {"prefixes": [Prefix([1] * 9), None]}),
    "nothing read": ("has a label in piece 0 where", {"prefixes": [Prefix([], replaced=1), None]}),
    "taught, not read": ("has a label in piece 1 where", {"prefixes": [None, Prefix([1, 2], replaced=2)]}),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_prefixes_that_cannot_be_are_one_sentence(tmp_path: Path, case: str) -> None:
    words, given = TOLD[case]
    made, (tokens, targets) = writer(tmp_path / "c", teacher_seq_len=14), some()
    with pytest.raises(ConfigError, match=words) as caught, made.shard(2) as shard:
        shard.write(tokens, targets, piece_lengths=[6, 4], documents=[0, 1], **given)
    assert "\n" not in str(caught.value) and made.missing() == [0, 1, 2]


def test_a_cache_without_contexts_takes_no_prefix(tmp_path: Path) -> None:
    tokens, targets = some()
    with pytest.raises(ConfigError, match="created without teacher_seq_len"), writer(tmp_path / "c").shard(0) as shard:
        shard.write(tokens, targets, prefixes=[Prefix([1])])
    for changes, words in (({"teacher_seq_len": 11}, "teacher_seq_len is 11"), ({"isolate": False}, "needs isolate")):
        with pytest.raises(ConfigError, match=words):
            writer(tmp_path / "d", **{"teacher_seq_len": 14, **changes})


def test_a_row_holds_no_more_prefixes_than_a_reader_takes(tmp_path: Path) -> None:
    made, (tokens, targets) = writer(tmp_path / "c", teacher_seq_len=12, shards=1), some(12)
    many = [Prefix([number] * 11) for number in range(12)]
    with pytest.raises(ConfigError, match="has prefixes of 132 tokens, above 8 times"), made.shard(0) as shard:
        shard.write(tokens, targets, piece_lengths=[1] * 12, documents=[0] * 12, prefixes=many)
    with made.shard(0) as shard:
        shard.write(tokens, targets, piece_lengths=[1] * 12, documents=[0] * 12, prefixes=[many[0]] * 12)
    assert open_cache(tmp_path / "c").read_packed(0)[0].prefixes.tokens.tolist() == [0] * 11


def test_caches_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    bad: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "shards is 0": (ConfigError, {"shards": 0}),
        "documents is 2, fewer than the 3 shards": (ConfigError, {"documents": 2}),
        "above the vocabulary": (ConfigError, {"selection": Selection(k=51)}),
        "outside 0.01 to 100": (ConfigError, {"temperatures": (0.001,)}),
        "precision": (ConfigError, {"precision": "float8"}),
        "has no tokenizer": (ModelError, {"tokenizer": tmp_path}),
    }
    for words, (error, changes) in bad.items():
        with pytest.raises(error, match=words):
            writer(tmp_path / "c", **changes)
    assert not (tmp_path / "c").exists()
    made = writer(tmp_path / "c")
    before = files(tmp_path / "c")
    for changes in ({"teacher": "u"}, {"seq_len": 13}, {"shards": 4}, {"selection": Selection(k=5)}, {"corpus": "x"}):
        with pytest.raises(CacheMismatchError, match="another configuration"):
            writer(tmp_path / "c", **changes)
    with pytest.raises(ConfigError, match="shard is 3, but the cache has the shards 0 to 2"), made.shard(3):
        pass
    assert files(tmp_path / "c") == before


def test_a_tokenizer_goes_along(tmp_path: Path, teacher: Path) -> None:
    made = writer(tmp_path / "c", tokenizer=teacher, vocab_size=320)
    write_all(made)
    from kdcache.report.inspect import inspect_row

    assert inspect_row(str(tmp_path / "c"), 0)["tokens"][0]["text"]


BAD_SHARDS: dict[str, dict[str, Any]] = {
    "documents": {"documents": -1},
    "dropped": {"dropped": 10**9},
    "not a number": {"compute": {"x": float("nan")}},
    "too much": {"compute": {"x": [0] * 70_000}},
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_commit_that_no_reader_would_take_is_not_written(tmp_path: Path, name: str) -> None:
    made = writer(tmp_path / "c")
    with pytest.raises(ConfigError, match="shard 1 cannot be committed"), made.shard(1) as shard:
        shard.write(*some())
        for field, value in BAD_SHARDS[name].items():
            setattr(shard, field, value)
    assert made.missing() == [0, 1, 2]
    write_all(made)
    assert made.finish()["complete"] and verify_cache(tmp_path / "c").ok


def test_a_row_that_is_refused_counts_for_nothing(tmp_path: Path) -> None:
    made = writer(tmp_path / "c", extras={"h": ExtraSpec(width=2)}, shards=1)
    tokens, targets = some()
    assert targets.label_logprob is not None and targets.entropy is not None
    with made.shard(0) as shard:
        with pytest.raises(TargetError, match="extra"):
            shard.write(tokens, targets, extras={"h": torch.zeros(10, 3)})
        for field, wrong, words in (
            ("label_logprob", -targets.label_logprob, "a label_logprob above 0"),
            ("entropy", targets.entropy + 9, "an entropy outside 0 to 3.91 nats"),
        ):
            bad = dataclasses.replace(targets, **{field: wrong})  # type: ignore[arg-type]
            with pytest.raises(TargetError, match=words):
                shard.write(tokens, bad, extras={"h": torch.zeros(10, 2)})
        shard.write(tokens, targets, extras={"h": torch.zeros(10, 2)})
    assert made.finish()["complete"] and verify_cache(tmp_path / "c").ok and len(open_cache(tmp_path / "c")) == 1
