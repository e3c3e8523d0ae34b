"""A teacher that reads more than its student: what is stored is what it says behind its own context.

The oracle is the model itself, in float64, over the whole of what it reads, one document at a time; which tokens those
are is put together here from the texts, not from what the cache says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import Selection, create_cache, open_cache, select, verify_cache
from kdcache.convert import convert
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.report.faithfulness import check_faithfulness
from kdcache.report.inspect import inspect_position, inspect_row, inspect_summary
from kdcache.report.prompt import next_tokens
from kdcache.rows import RowSpec, labelled_tokens
from kdcache.teacher.check_data import check_data
from kdcache.teacher.config import CheckOptions
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import base
from kdcache.teacher.engines.base import Engine, EngineOutput, TargetRequest, TeacherSpec, register_engine
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.open_teacher import open_teacher_of
from tests.making import TEXTS, dump_options, make_odd
from tests.processes import kdcache

SYSTEM = "Every fox is quick and every cat is sad. "
HINTS = [None, "The answer is known to all: ", "It was in the second year. "]
SOME = TEXTS[:24]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, of which two in three have a hint of their own for the teacher; some are longer than a row."""
    records = [{"text": text, "teacher_prompt": HINTS[i % 3]} for i, text in enumerate(SOME)]
    return write(tmp_path_factory.mktemp("hinted") / "c.jsonl", records)


@pytest.fixture(scope="module")
def told(teacher: Path, hinted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("told") / "c"
    assert dump(dump_options(teacher, hinted, out, teacher_system=SYSTEM, docs_per_shard=10))["complete"]
    return out


@pytest.fixture(scope="module")
def plain(teacher: Path, hinted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts of a teacher that reads what its student does."""
    out = tmp_path_factory.mktemp("plain") / "c"
    assert dump(dump_options(teacher, hinted, out, ignore_columns="teacher_prompt", docs_per_shard=10))["complete"]
    return out


class Oracle:
    """The teacher in float64."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """`[n, 320]` after each of some tokens."""
        return self._model(input_ids=torch.tensor([tokens])).logits[0, :, :320]


@pytest.fixture(scope="module")
def oracle(teacher: Path) -> Oracle:
    return Oracle(teacher)


def pieces(cache: Path) -> Iterator[tuple[int, list[int], Any, Any]]:
    """Document, tokens, labels and targets of each piece, in the order in which documents were cut."""
    found = []
    for row in open_cache(cache):
        for piece, document in enumerate(row.documents.tolist()):
            slots = (row.segments == piece).nonzero()[:, 0]
            found.append((document, row.tokens[slots].tolist(), row.labels[slots], row.targets[slots]))
    return iter(found)


def assert_targets(targets: Any, labels: Tensor, logits: Tensor) -> int:
    """Targets are those of dense float64 logits; how many there are."""
    at = labels != -100
    logp = logits[at].log_softmax(-1)
    top = logp.topk(8).values
    mine = targets[at]
    for name, truth in (
        ("logprobs", top),
        ("label_logprob", logp.gather(-1, labels[at][:, None])[:, 0]),
        ("entropy", -(logp.exp() * logp).sum(-1)),
        ("log_partition", torch.stack([(logp / t).logsumexp(-1) for t in (1.0, 2.0)], -1)),
    ):
        torch.testing.assert_close(getattr(mine, name).double(), truth, atol=1e-4, rtol=0)
    assert not targets.count[~at].any()
    return int(at.sum())


def test_targets_are_those_of_a_plain_forward_of_prompt_and_text(told: Path, oracle: Oracle) -> None:
    bos, eos = oracle.tokenizer.bos_token_id, oracle.tokenizer.eos_token_id
    whole = [[bos, *oracle.ids(text), eos] for text in SOME]
    prompts = [[bos, *oracle.ids(SYSTEM + (HINTS[i % 3] or ""))] for i in range(len(SOME))]
    seen, positions, cut = [0] * len(SOME), 0, 0
    for document, tokens, labels, targets in pieces(told):
        first, text = tokens[0] == bos, whole[document]  # of a text that is cut, the other pieces begin in its middle
        assert any(text[i : i + len(tokens)] == tokens for i in range(len(text)))  # and nothing of the prompt
        assert labels.tolist() == [*tokens[1:], -100]
        read = [*prompts[document], *tokens[int(first) :]]
        positions += assert_targets(targets, labels, oracle.logits(read)[len(read) - len(tokens) :])
        seen[document], cut = seen[document] + len(tokens), cut + (not first)
    assert seen == [len(tokens) - (len(tokens) % 64 == 1) for tokens in whole]  # a last token alone is left out
    assert positions == sum(seen) - len(whole) - cut and cut >= 3


def test_a_students_rows_are_those_of_a_cache_without_contexts(told: Path, plain: Path) -> None:
    """Rows are as dense, and hold the same; the targets are others."""
    assert len(open_cache(told)) == len(open_cache(plain))
    moved = []
    for one, other in zip(open_cache(told), open_cache(plain), strict=True):
        for name in ("tokens", "labels", "segments", "documents"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        at = one.labels != -100
        moved.append((one.targets.label_logprob - other.targets.label_logprob)[at].abs())  # type: ignore[operator]
    assert torch.cat(moved).mean() > 0.05


def test_verify_makes_the_targets_again_from_the_cache_alone(told: Path, teacher: Path) -> None:
    assert verify_cache(told).ok
    found = check_faithfulness(told, str(teacher), rows=8, device="cpu")
    assert found["agrees"] and found["stored"]["total_variation"]["worst"] < 1e-4
    cache = open_cache(told)
    row, stored = cache.read_packed(0)
    assert row.prefixes is not None and len(stored.count) == labelled_tokens(row).sum()
    spec = TeacherSpec(model=str(teacher), device="cpu", batch_rows=2)
    with open_teacher_of(spec, cache.manifest, told) as opened:  # fewer rows a batch than the teacher's rows are
        rows = [cache.read_packed(i)[0] for i in range(len(cache))]
        again = opened.targets(rows, TargetRequest.of(cache.manifest))
        logits = torch.cat(list(opened.logits(rows)))
    assert again.counts == [int(labelled_tokens(row).sum()) for row in rows]
    expected = torch.cat([cache.read_packed(i)[1].label_logprob for i in range(len(cache))])  # type: ignore[misc]
    torch.testing.assert_close(again.targets.label_logprob, expected, atol=1e-4, rtol=0)
    entropy = torch.cat([cache.read_packed(i)[1].entropy for i in range(len(cache))])  # type: ignore[misc]
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(-(logp.exp() * logp).sum(-1), entropy, atol=1e-4, rtol=0)


def test_the_public_writer_takes_what_a_teacher_was_told(told: Path, teacher: Path, tmp_path: Path) -> None:
    """A program that knows pieces, prefixes and targets writes the cache that dump-teacher does."""
    cache, manifest = open_cache(told), open_cache(told).manifest
    out = create_cache(
        tmp_path / "c", vocab_size=manifest.vocab_size, seq_len=manifest.seq_len, selection=manifest.rule, shards=1,
        teacher=manifest.teacher_sha256, documents=manifest.documents, temperatures=manifest.temperatures,
        precision=manifest.precision, teacher_seq_len=manifest.teacher_context["seq_len"], tokenizer=teacher,
    )  # fmt: skip
    with out.shard(0) as shard:
        for number in range(len(cache)):
            row, targets = cache.read_packed(number)
            shard.write(
                row.tokens, targets, piece_lengths=row.piece_lengths, documents=row.piece_documents,
                prefixes=[row.prefix(piece) for piece in range(len(row.piece_lengths))],
            )  # fmt: skip
    assert out.finish()["complete"] and verify_cache(tmp_path / "c").ok
    for number in range(len(cache)):
        (ours, targets), (theirs, wanted) = open_cache(tmp_path / "c").read_packed(number), cache.read_packed(number)
        assert ours.prefixes is not None and theirs.prefixes is not None
        assert np.array_equal(ours.prefixes.tokens, theirs.prefixes.tokens)
        assert np.array_equal(ours.prefixes.places, theirs.prefixes.places)
        assert torch.equal(targets.logprobs, wanted.logprobs) and torch.equal(targets.ids, wanted.ids)
    found = check_faithfulness(tmp_path / "c", str(teacher), rows=4, device="cpu")
    assert found["agrees"] and found["stored"]["total_variation"]["worst"] < 1e-4


class PieceByPiece(Engine):
    """An engine that knows of no rows: it runs one piece after the other, and gives ready entries."""

    name = "by-pieces"

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._vocab = rows.vocab_size

    @torch.inference_mode()
    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        logits = [self._model(input_ids=piece.tokens[None]).logits[0, piece.slots] for piece in batch.pieces()]
        given = torch.cat(logits)[:, : self._vocab]
        made = select(given, request.selection, labels=batch.labels, temperatures=request.temperatures, keys=batch.keys)
        return EngineOutput(positions=made)


def test_an_engine_that_runs_pieces_needs_to_know_nothing_of_it(
    teacher: Path, hinted: Path, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base._ENGINES, "_values", dict(base._ENGINES._values))
    register_engine(PieceByPiece)
    options = {"engine": "by-pieces", "teacher_system": SYSTEM, "docs_per_shard": 10, "batch_rows": 3}
    dump(dump_options(teacher, hinted, tmp_path / "c", **options))
    for one, other in zip(open_cache(tmp_path / "c"), open_cache(told), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        for name in ("label_logprob", "entropy", "log_tail"):
            torch.testing.assert_close(getattr(one.targets, name), getattr(other.targets, name), atol=1e-4, rtol=0)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chats_of_several_answers(teacher: Path, tmp_path: Path, oracle: Oracle) -> None:
    """The teacher has a system prompt, or another question; only answers are taught, from the first of their tokens."""
    roles = ("user", "assistant") * 2
    talks = [
        [{"role": role, "content": text[4:10].strip()} for role, text in zip(roles, TEXTS[i : i + 4], strict=True)]
        for i in range(6)
    ]
    hint = [{"role": "user", "content": "All that is asked has an answer."}]
    records = [
        {"messages": talk, "teacher_messages": [*hint, *talk] if i % 2 else None} for i, talk in enumerate(talks)
    ]
    records[0], records[1] = records[1], records[0]
    (tmp_path / "template").write_text(CHAT)
    made = dump_options(
        teacher, write(tmp_path / "c.jsonl", records), tmp_path / "c", seq_len=96, teacher_system=SYSTEM,
        teacher_seq_len=128, chat_template=str(tmp_path / "template"),
    )  # fmt: skip
    assert not dump(made)["dropped"]
    oracle.tokenizer.chat_template = CHAT
    for document, tokens, labels, targets in pieces(tmp_path / "c"):
        record = records[document]
        shown = [{"role": "system", "content": SYSTEM}, *(record["teacher_messages"] or record["messages"])]
        text = oracle.tokenizer.apply_chat_template(shown, tokenize=False)
        assert oracle.tokenizer.decode(tokens) == oracle.tokenizer.apply_chat_template(
            record["messages"], tokenize=False
        )
        taught = "".join(m["content"] + "\n" for m in record["messages"] if m["role"] == "assistant")
        assert oracle.tokenizer.decode(labels[labels != -100]).replace("\n", "") == taught.replace("\n", "")
        begin = oracle.ids(text[: len(text) - len(oracle.tokenizer.decode(tokens))])
        assert_targets(targets, labels, oracle.logits([*begin, *tokens])[len(begin) :])


def test_draws_are_those_of_the_students_places(teacher: Path, hinted: Path, tmp_path: Path, oracle: Oracle) -> None:
    """A sampled target is drawn for the shard, row and slot that the student's position has."""
    options = {"select": "ipps", "k": 6, "teacher_system": SYSTEM, "docs_per_shard": 10, "limit_docs": 12}
    dump(dump_options(teacher, hinted, tmp_path / "c", **options))
    cache, compared = open_cache(tmp_path / "c"), 0
    for index in range(len(cache)):
        row, stored = cache.read_packed(index)
        (shard, number), start, first = cache.locate(index), 0, 0
        for piece, length in enumerate(row.piece_lengths.tolist()):
            prefix = row.prefix(piece)
            read = [*prefix.tokens.tolist(), *row.tokens[start + prefix.replaced : start + length].tolist()]
            logits = oracle.logits(read)[-length:][:-1].float()  # every slot but the last is labelled
            keys = torch.tensor([(shard, number, start + slot) for slot in range(length - 1)])
            fresh = select(logits, Selection(kind="ipps", k=6), temperatures=(1.0, 2.0), keys=keys)
            same = (fresh.ids.sort(-1).values == stored[first : first + length - 1].ids.sort(-1).values).all(-1)
            compared += length - 1
            assert same.float().mean() > 0.97  # a draw at the edge of an entry may fall to either side
            start, first = start + length, first + length - 1
    assert compared > 300


@pytest.mark.parametrize("changes", [{}, {"precision": "6", "k": 4}], ids=["zarr", "fewer"])
def test_convert_keeps_what_the_teacher_read(
    told: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    convert(str(told), str(tmp_path / "c"), store="zarr", **changes)
    assert verify_cache(tmp_path / "c").ok
    assert open_cache(tmp_path / "c").manifest.teacher_context == {"seq_len": 128, "system": SYSTEM}
    assert check_faithfulness(tmp_path / "c", str(teacher), rows=4, device="cpu")["agrees"]


def test_what_is_reused_was_read_behind_the_same_context(
    teacher: Path, told: Path, plain: Path, hinted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def copied(out: str, reuse: Path, **changes: Any) -> int:
        options = {"teacher_system": SYSTEM, "docs_per_shard": 7, "reuse": (str(reuse),), **changes}
        summary = dump(dump_options(teacher, hinted, tmp_path / out, **options))
        assert summary["complete"] and verify_cache(tmp_path / out).ok
        assert check_faithfulness(tmp_path / out, str(teacher), rows=6, device="cpu")["agrees"]
        return int(summary["reused"]["positions"])

    total = int(open_cache(told).commits.total("positions"))
    assert copied("same", told) == total  # in other rows
    assert copied("other", told, teacher_system="Another one. ") == 0
    assert copied("none", plain) == 0
    part = copied("part", told, teacher_system=None)  # no document has the same context any more
    assert part == 0


def test_a_part_of_the_contexts_is_reused(
    teacher: Path, tmp_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hint in two is changed: of a row, some pieces are copied and some are run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    texts = [text[:40] for text in TEXTS[:20]]
    for name, hints in (("old", ("one ", "two ")), ("new", ("one ", "three "))):
        records = [{"text": text, "teacher_prompt": hints[i % 2]} for i, text in enumerate(texts)]
        reuse = () if name == "old" else (str(tmp_path / "old"),)
        summary = dump(dump_options(teacher, write(tmp_path / f"{name}.jsonl", records), tmp_path / name, reuse=reuse))
    assert 0.4 < summary["reused"]["positions"] / summary["positions"] < 0.6
    bos = oracle.tokenizer.bos_token_id
    for document, tokens, labels, targets in pieces(tmp_path / "new"):
        read = [bos, *oracle.ids(("one ", "three ")[document % 2]), *tokens[1:]]
        assert_targets(targets, labels, oracle.logits(read)[len(read) - len(tokens) :])


@pytest.mark.slow
def test_a_row_for_each_document_for_models_that_cannot_isolate(tmp_path: Path, hinted: Path) -> None:
    odd = make_odd(tmp_path / "mamba", "mamba")
    dump(dump_options(odd, hinted, tmp_path / "c", pack="none", teacher_system=SYSTEM, limit_docs=8))
    found = check_faithfulness(tmp_path / "c", str(odd), rows=8, device="cpu")
    assert found["agrees"] and math.isclose(found["stored"]["total_variation"]["worst"], 0, abs_tol=1e-3)
    model = Oracle(odd)
    for document, tokens, labels, targets in pieces(tmp_path / "c"):
        if tokens[0] != model.tokenizer.bos_token_id:
            continue
        read = [tokens[0], *model.ids(SYSTEM + (HINTS[document % 3] or "")), *tokens[1:]]
        at = labels != -100
        truth = model.logits(read)[len(read) - len(tokens) :][at].log_softmax(-1)
        mine = targets[at].label_logprob
        torch.testing.assert_close(
            mine.double(), truth.gather(-1, labels[at][:, None])[:, 0], atol=1e-3, rtol=0, check_dtype=False
        )


def test_a_document_that_the_teacher_cannot_read_is_counted(teacher: Path, tmp_path: Path) -> None:
    """Its context is never left out: what does not fit is cut to fit, or dropped by name."""
    records = [
        {"text": "the fox jumped over the wall", "teacher_prompt": None},
        {"text": TEXTS[2], "teacher_prompt": "x" * 40},
        {"text": "the fox", "teacher_prompt": "x" * 400},
    ]
    options = {"seq_len": 32, "teacher_seq_len": 48}
    summary = dump(dump_options(teacher, write(tmp_path / "c.jsonl", records), tmp_path / "c", **options))
    assert summary["dropped"] == {"teacher-overlong": 1} and summary["cut"] == 1
    cache = open_cache(tmp_path / "c")
    for index in range(len(cache)):
        row, _ = cache.read_packed(index)
        for piece, length in enumerate(row.piece_lengths.tolist()):
            prefix = row.prefix(piece)
            assert len(prefix.tokens) + length - prefix.replaced <= 48
            assert bool(len(prefix.tokens)) == (row.piece_documents[piece] == 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_system": ""}, "teacher_system is empty"),
        ({"teacher_seq_len": 32}, "teacher_seq_len is 32, but must be at least seq_len 64"),
        ({"teacher_seq_len": 4000}, "teacher_seq_len is 4000, above the 128 positions"),
        ({"teacher_system": "x", "isolate": False}, "needs isolate"),
        ({"teacher_system": "x", "extra": ("hidden:-1",)}, "extra hidden:-1 has a vector for each token"),
    ],
)
def test_options_that_exclude_each_other(
    teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        dump(dump_options(teacher, corpus, tmp_path / "c", **changes))
    assert not (tmp_path / "c").exists()


def test_a_dump_goes_on_behind_the_same_context_only(teacher: Path, hinted: Path, told: Path) -> None:
    for changes in ({"teacher_system": "Another. "}, {"teacher_system": SYSTEM, "teacher_seq_len": 100}):
        with pytest.raises(CacheMismatchError, match="differs in teacher_context"):
            dump(dump_options(teacher, hinted, told, docs_per_shard=10, **changes))
    assert verify_cache(told).ok


def test_what_is_shown_of_it(told: Path, plain: Path, teacher: Path, hinted: Path) -> None:
    assert inspect_summary(str(told))["teacher_context"] == {"seq_len": 128, "system": SYSTEM}
    assert inspect_summary(str(plain))["teacher_context"] is None
    row = inspect_row(str(told), 0)
    assert [one["piece"] for one in row["teacher_read"]] == list(range(row["pieces"]))
    assert row["teacher_read"][0]["text"].startswith(f"<s>{SYSTEM}") and not inspect_row(str(plain), 0)["teacher_read"]
    at = inspect_position(str(told), 0, 3)
    assert at["teacher_read"]["text"].startswith(f"<s>{SYSTEM}") and SYSTEM not in at["context"]
    checked = check_data(CheckOptions(teacher=str(teacher), corpus=str(hinted), seq_len=64, teacher_system=SYSTEM))
    assert checked["teacher_context"] == {"seq_len": 128, "system": SYSTEM}
    assert checked["examples"][1]["teacher"] == {"text": f"<s>{SYSTEM}{HINTS[1]}", "replaces": "<s>"}
    live = next_tokens([str(teacher)], str(told), "The fox jumped", str(teacher), top=3, device="cpu")
    assert live["teacher"]["told"] == SYSTEM
    assert live["teacher"]["entries"] != live["students"][str(teacher)]["entries"]
    stored = next_tokens([str(teacher)], str(told), SOME[0][:14], top=3, device="cpu")
    assert stored["teacher"]["source"] == "cache" and stored["teacher"]["told"].startswith(f"<s>{SYSTEM}")


@pytest.mark.slow
def test_the_commands_show_it_too(told: Path, teacher: Path, hinted: Path) -> None:
    for more in ((), ("--row", "0"), ("--row", "0", "--position", "3")):
        ran = kdcache("inspect-shard", told, *more)
        assert ran.returncode == 0 and "fox is quick" in " ".join(ran.stdout.split())
    ran = kdcache("check-data", "--teacher", teacher, "--corpus", hinted, "--seq-len", 64, "--teacher-system", SYSTEM)
    assert ran.returncode == 0 and "the teacher alone reads '<s>Every fox" in " ".join(ran.stdout.split())
    ran = kdcache("check-data", "--teacher", teacher, "--corpus", hinted, "--teacher-system", "")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "--teacher-system is empty" in ran.stderr


def test_a_row_that_lies_about_what_was_read_is_refused(told: Path) -> None:
    """Whatever stands in the two streams, reading gives a row that fits them or says that it is damaged."""
    from kdcache.errors import CorruptCacheError
    from kdcache.store.row_format import Record

    cache = open_cache(told)
    form = cache.manifest.row_format
    row, targets = cache.read_packed(0)
    honest = form.pack(row, targets)
    assert form.unpack(honest)[0].prefixes is not None
    places = honest.streams["prefixed"].reshape(-1, 3)
    for where, value in (
        ((0, 0), -1),
        ((0, 1), 1 << 40),
        ((0, 0), 1 << 62),
        ((0, 2), 2),
        ((0, 2), 1 << 40),
        ((0, 1), 0),
    ):
        lie = places.copy()
        lie[where] = value
        record = Record(positions=honest.positions, streams={**honest.streams, "prefixed": lie.ravel()})
        with pytest.raises(CorruptCacheError, match="teacher"):
            form.unpack(record)
    for name, lie in (("prefixed", places.ravel()[:-3]), ("prefix", np.full(5, 9999, np.uint16))):
        with pytest.raises(CorruptCacheError, match="teacher context"):
            form.unpack(Record(positions=honest.positions, streams={**honest.streams, name: lie}))
