"""Engines from outside: what they give is used or refused, and what they do not know is refused before they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, open_cache, select
from kdcache.errors import ConfigError, EngineError, LogitsError
from kdcache.report.evaluate import evaluate
from kdcache.rows import PackedRow, RowSpec
from kdcache.teacher import shard_maker
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import base
from kdcache.teacher.engines.base import (
    Engine,
    EngineKnowledge,
    EngineOutput,
    HiddenStates,
    Logits,
    TargetRequest,
    TeacherSpec,
    find_engine,
    register_engine,
)
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.open_teacher import open_teacher
from tests.making import dump_options
from tests.processes import kdcache
from tests.teacher.test_dump import files

WEIGHTS = 3 * torch.randn(320, 330, generator=torch.Generator().manual_seed(3))
"""Logits of what follows each token; of a vocabulary that is padded to 330."""


SHAPE = RowSpec(vocab_size=320, seq_len=16)


class Bigram(Engine):
    """Takes pieces one by one and gives logits of each."""

    name = "bigram"

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        self.opened = True

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        parts = [WEIGHTS[piece.tokens[piece.slots]] for piece in batch.pieces()]
        return EngineOutput(positions=Logits(torch.cat([torch.zeros(0, 330), *parts])))

    def close(self) -> None:
        assert self.opened
        self.opened = False


class TwoPart(Bigram):
    """The same teacher, by its hidden states (the tokens) and its head."""

    name = "two-part"

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        flat = batch.tokens[batch.slots[:, 0], batch.slots[:, 1]]
        return EngineOutput(positions=HiddenStates(flat[:, None].float(), lambda hidden: WEIGHTS[hidden[:, 0].long()]))


class Selecting(Bigram):
    """The same teacher, which selects by itself, as one in another process would."""

    name = "selecting"

    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        logits = WEIGHTS[batch.tokens[batch.slots[:, 0], batch.slots[:, 1]], :320]
        targets = select(
            logits, request.selection, labels=batch.labels, temperatures=request.temperatures, seed=request.seed,
            keys=batch.keys,
        )  # fmt: skip
        return EngineOutput(positions=targets)


class TopOnly(Selecting):
    """A server of top-k at T = 1."""

    name = "top-only"
    knows = EngineKnowledge(whole_vocabulary=False, temperatures=(1.0,), entropy=False, label_logprob=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._ENGINES, "_values", dict(base._ENGINES._values))
    for engine in (Bigram, TwoPart, Selecting, TopOnly):
        register_engine(engine)


@pytest.mark.parametrize("options", [{}, {"select": "ipps", "adaptive": True, "precision": "6"}], ids=["topk", "ipps"])
def test_three_forms_of_one_teacher_make_one_cache(
    teacher: Path, corpus: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Hidden states with a head, logits piece by piece, and ready entries; the last has no logits for a pilot."""
    for name in ("bigram", "two-part", *(["selecting"] if not options else [])):
        summary = dump(dump_options(teacher, corpus, tmp_path / name, engine=name, limit_docs=40, **options))
        assert summary["complete"] and open_cache(tmp_path / name).commits[0].compute["engine"] == name
        data = [{n: d for n, d in files(tmp_path / x).items() if n.startswith("shards")} for x in (name, "bigram")]
        assert data[0] == data[1]
    row = open_cache(tmp_path / "bigram")[0]
    slot = int((row.labels != -100).nonzero()[5])
    truth = WEIGHTS[row.tokens[slot], :320].double().softmax(-1)
    if not options:
        assert row.targets.ids[slot].tolist() == truth.topk(8).indices.tolist()
        torch.testing.assert_close(row.targets.weights[slot].double(), truth.topk(8).values, rtol=1e-5, atol=0)


def test_other_commands_take_the_engine(teacher: Path, corpus: Path, student_config: Path, tmp_path: Path) -> None:
    from kdcache.report.faithfulness import check_faithfulness
    from kdcache.report.prompt import next_tokens

    dump(dump_options(teacher, corpus, tmp_path / "c", engine="bigram", limit_docs=20))
    found = check_faithfulness(tmp_path / "c", str(teacher), rows=2, engine="two-part")
    assert found["agrees"] and found["stored"]["total_variation"]["worst"] < 1e-5
    assert not check_faithfulness(tmp_path / "c", str(teacher), rows=2, device="cpu")["agrees"]
    student = str(student_config)
    figures = evaluate(student, str(tmp_path / "c"), str(teacher), rows=2, device="cpu", engine="bigram")
    assert figures["dense_kl"] > 0.1
    cache = open_cache(tmp_path / "c")
    answer = next_tokens([student], str(tmp_path / "c"), "The fox", str(teacher), engine="bigram", device="cpu")
    last = answer["tokens"][-1]["id"]
    truth = WEIGHTS[last, : cache.manifest.vocab_size].softmax(-1)
    assert answer["teacher"]["entries"][0]["probability"] == pytest.approx(truth.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select": "ipps", "temperatures": "1"}, "selection ipps needs the whole vocabulary"),
        ({"select": "topp", "top_p": 0.9, "temperatures": "1"}, "selection topp needs the whole vocabulary"),
        ({"select": "full", "temperatures": "1"}, "selection full needs the whole vocabulary"),
        ({"force_label": True, "temperatures": "1"}, "selection topk, with force_label, needs the whole vocabulary"),
        ({"temperatures": "1,2"}, "temperature 2 needs the partition at that temperature"),
        ({"temperatures": "1", "positions": "entropy>1"}, r"positions entropy>1 needs the teacher's entropy"),
        ({"temperatures": "1", "extra": ("hidden:-1",)}, "extra is hidden:-1, but the engine top-only offers no extra"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_an_engine_does_not_know_is_refused_before_it_opens(
    teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopOnly, "__init__", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ConfigError, match=words) as caught:
        dump(dump_options(teacher, corpus, tmp_path / "c", engine="top-only", **changes))
    assert "top-only" in str(caught.value) and not (tmp_path / "c").exists()


def row(*tokens: int) -> PackedRow:
    half = len(tokens) // 2
    return PackedRow(
        tokens=np.array(tokens, np.int32), piece_lengths=np.array([half, len(tokens) - half], np.int32),
        piece_documents=np.array([4, 9]),
    )  # fmt: skip


def put(name: str, position: int, value: float) -> Callable[[SparseTargets], SparseTargets]:
    def change(targets: SparseTargets) -> SparseTargets:
        values: Tensor = getattr(targets, name).clone()
        values[position] = value
        return dataclasses.replace(targets, **{name: values})

    return change


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fewer": (lambda t: t[:-1], "gave 7 positions for 8 labelled slots"),
    "more": (lambda t: SparseTargets.cat([t, t[:1]]), "gave 9 positions for 8 labelled slots"),
    "an id too large": (
        put("ids", 5, 320),
        "an id outside the vocabulary of 320 in document 9 of the corpus, 1 ",
    ),
    "an id below 0": (put("ids", 0, -1), "an id outside the vocabulary of 320 in document 4 of the corpus, 0 tokens"),
    "one id twice": (put("ids", 2, 7), "one id twice in document 4"),
    "no number": (put("logprobs", 3, torch.nan), "a log-probability that is not finite in document 4"),
    "a large number": (put("logprobs", 3, 0.5), "a log-probability above 0"),
    "an infinite weight": (put("weights", 3, torch.inf), "a weight that is not finite"),
    "a negative weight": (put("weights", 3, -0.1), "a negative weight"),
    "a tail that is no number": (put("log_tail", 7, torch.nan), "a value of log_tail above 0 in document 9"),
    "no entropy": (put("entropy", 7, torch.nan), "a value of entropy that is not finite"),
    "no entropy at all": (lambda t: dataclasses.replace(t, entropy=None), "gave no entropy"),
    "fewer entries": (put("count", 4, 7), "fewer than 8 or more than 8 entries"),
    "too many entries": (put("count", 4, 9), "fewer than 8 or more than 8 entries"),
    "another kind": (lambda t: dataclasses.replace(t, kind="topp"), "targets of kind topp, but topk is asked"),
    "another temperature": (
        lambda t: dataclasses.replace(t, temperatures=(2.0,)),
        r"temperatures \(2.0,\), but \(1.0,\)",
    ),
    "another width": (lambda t: t.widen(9), "targets of width 9, but 8 is asked"),
}


@pytest.mark.parametrize("lie", LIES)
def test_entries_that_were_not_asked_for(teacher: Path, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = LIES[lie]
    true = Selecting.run

    def run(self: Any, batch: Batch, request: TargetRequest) -> EngineOutput:
        return EngineOutput(positions=change(true(self, batch, request).positions))

    monkeypatch.setattr(Selecting, "run", run)
    spec = TeacherSpec(model=str(teacher), engine="selecting")
    with (
        open_teacher(spec, SHAPE) as opened,
        pytest.raises(EngineError, match=words) as e,
    ):
        opened.targets([row(*range(10, 20))], TargetRequest(selection=Selection(k=8)))
    assert str(e.value).startswith("the engine selecting gave ") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (Logits(torch.zeros(7, 320)), "gave 7 positions for 8 labelled slots"),
        (Logits(torch.zeros(8, 319)), r"gave logits of shape \(8, 319\) for 8 positions and a vocabulary of 320"),
        (HiddenStates(torch.zeros(9, 4), lambda h: h), "gave 9 positions for 8 labelled slots"),
        (
            HiddenStates(torch.zeros(8, 4), lambda h: torch.zeros(3, 320)),
            r"gave logits of shape \(3, 320\) for 8 positions",
        ),
    ],
)
def test_logits_that_do_not_fit(teacher: Path, positions: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bigram, "run", lambda *_: EngineOutput(positions=positions))
    spec, wanted = TeacherSpec(model=str(teacher), engine="bigram"), f"the engine bigram {words}"
    with open_teacher(spec, SHAPE) as opened, pytest.raises(EngineError, match=wanted):
        opened.targets([row(*range(10, 20))], TargetRequest(selection=Selection(k=8)))


def test_bad_logits_of_any_engine_name_the_document(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sick = WEIGHTS.clone()
    sick[17] = torch.inf
    monkeypatch.setattr("tests.teacher.test_engines.WEIGHTS", sick)
    spec = TeacherSpec(model=str(teacher), engine="bigram")
    wanted = "in document 9 of the corpus, 2 tokens into its piece"
    with open_teacher(spec, SHAPE) as opened, pytest.raises(LogitsError, match=wanted):
        opened.targets([row(*range(10, 20))], TargetRequest(selection=Selection(k=8)))


def test_an_engine_that_does_not_open_or_fails_is_closed(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Engine] = []
    monkeypatch.setattr(Bigram, "close", lambda engine: closed.append(engine))
    spec = TeacherSpec(model=str(teacher), engine="bigram")
    monkeypatch.setattr(Bigram, "describe", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_teacher(spec, SHAPE)
    assert len(closed) == 1


@pytest.mark.parametrize("isolate", [True, False])
def test_pieces_cover_the_labelled_slots(isolate: bool) -> None:
    spec = RowSpec(vocab_size=320, seq_len=16, isolate=isolate)
    batch = Batch([row(*range(10, 20)), row(7, 8), row(*range(30, 43))], spec)
    given: Iterator[list[int]] = (piece.tokens[piece.slots].tolist() for piece in batch.pieces())
    assert [t for part in given for t in part] == batch.tokens[batch.slots[:, 0], batch.slots[:, 1]].tolist()
    ends = [piece.first + len(piece.slots) for piece in batch.pieces()]
    assert [0, *ends[:-1]] == [piece.first for piece in batch.pieces()] and ends[-1] == len(batch.labels)
    assert sum(batch.counts) == len(batch.labels) == 8 + 11
    restarts = int((batch.position_ids[0] == 0).sum())
    assert restarts == (3 if isolate else 1)  # two pieces and the padding


def test_names(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    assert find_engine("transformers").name == "transformers"
    with pytest.raises(ConfigError, match="engine named bigram is registered already"):
        register_engine(Bigram)
    with pytest.raises(ConfigError, match=r"engine steam is not one of transformers, vllm, server, bigram"):
        dump_options(teacher, corpus, tmp_path, engine="steam")
    done = kdcache(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", tmp_path / "c", "--engine", "steam"
    )
    assert done.returncode == 2
    assert done.stderr.endswith("engine steam is not one of transformers, vllm, server\n"), done.stderr


class Changing(Bigram):
    """Learns, when it opens, that it does not know the entropy."""

    name = "changing"

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        super().__init__(spec, folder, rows)
        self.knows = EngineKnowledge(entropy=False)  # type: ignore[misc]


def test_an_open_engine_may_know_less_than_its_class(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    register_engine(Changing)
    options = {"engine": "changing", "limit_docs": 30, "docs_per_shard": 10}
    dump(dump_options(teacher, corpus, tmp_path / "c", worker="1/3", **options))
    assert dump(dump_options(teacher, corpus, tmp_path / "c", **options))["complete"]
    cache = open_cache(tmp_path / "c")
    assert not cache.known.entropy and cache.known.label_logprob and cache[0].targets.entropy is None
    with pytest.raises(ConfigError, match="needs the teacher's entropy, which the engine changing does not know"):
        dump(dump_options(teacher, corpus, tmp_path / "d", positions="entropy>1", **options))
    assert not (tmp_path / "d").exists()


def test_a_shard_that_another_worker_commits_meanwhile_is_not_run(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"engine": "bigram", "limit_docs": 30, "docs_per_shard": 10}
    dump(dump_options(teacher, corpus, tmp_path / "c", worker="0/3", **options))
    inner, runs = shard_maker.committed, []

    def others_work(*arguments: Any) -> list[int]:
        before = inner(*arguments)
        monkeypatch.setattr(shard_maker, "committed", inner)
        dump(dump_options(teacher, corpus, tmp_path / "c", **options))
        run = Bigram.run
        monkeypatch.setattr(Bigram, "run", lambda self, *given: runs.append(1) or run(self, *given))
        return before

    monkeypatch.setattr(shard_maker, "committed", others_work)
    assert dump(dump_options(teacher, corpus, tmp_path / "c", **options))["shards"]["by_this_worker"] == 0
    assert not runs
