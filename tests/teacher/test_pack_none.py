"""A row for each document: the targets of any causal model are those that it gives each document alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kdcache_cli.frame import in_options
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import Row, open_cache
from kdcache.errors import CorpusError, IsolationError
from kdcache.rows import PackedRow, RowSpec
from kdcache.store.commit import Commit
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump
from kdcache.teacher.engines.batch import Batch
from tests.making import ODD, TEXTS, dump_options, make_odd

DOCUMENTS = 40


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 20 to about 200 tokens."""
    path = tmp_path_factory.mktemp("unequal") / "texts.jsonl"
    texts = [" ".join(TEXTS[i : i + 1 + i % 3]) for i in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", params=["llama", *ODD])
def any_teacher(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher if request.param == "llama" else make_odd(tmp_path_factory.mktemp(request.param), request.param)


def require_alone(row: Row, model: Any) -> int:
    """Each piece of a row has the targets that the model gives for its tokens alone; returns the number of pieces."""
    pieces = int(row.segments.max()) + 1
    for piece in range(pieces):
        here = row.segments == piece
        with torch.no_grad():
            alone = model(input_ids=row.tokens[here][None], use_cache=False).logits[0, :-1, :320].double()
        targets = row.targets[here.nonzero()[:-1, 0]]
        assert (targets.count == 8).all()
        log_p = alone.log_softmax(-1)
        torch.testing.assert_close(targets.logprobs.double(), log_p.topk(8).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(targets.logprobs.double(), log_p.gather(-1, targets.ids), atol=1e-4, rtol=0)
    return pieces


def test_targets_are_those_of_each_document_alone(any_teacher: Path, unequal: Path, tmp_path: Path) -> None:
    options = {"pack": "none", "seq_len": 128, "docs_per_shard": 25, "batch_rows": 4}
    assert dump(dump_options(any_teacher, unequal, tmp_path / "c", **options))["complete"]
    cache, model = open_cache(tmp_path / "c"), AutoModelForCausalLM.from_pretrained(any_teacher).eval()
    encode = AutoTokenizer.from_pretrained(any_teacher)
    texts = [json.loads(line)["text"] for line in unequal.read_text().splitlines()]
    wanted = [encode(text)["input_ids"] for text in texts]
    pieces = sorted(ids[start : start + 128] for ids in wanted for start in range(0, len(ids), 128))
    assert len(pieces) > DOCUMENTS > sum(len(ids) > 128 for ids in wanted) > 5
    found = []
    for row in cache:
        assert require_alone(row, model) == 1
        found.append(row.tokens[row.segments == 0].tolist())
    assert sorted(found) == pieces
    lengths, ends = [len(tokens) for tokens in found], np.cumsum([commit.rows for commit in commits(tmp_path / "c")])
    for part in np.split(np.array(lengths), ends[:-1]):  # of a shard, the longest first
        assert (np.diff(part) <= 0).all() and len(set(part.tolist())) > 5
    assert not any("mask" in commit.compute for commit in commits(tmp_path / "c"))


def commits(cache: Path) -> list[Commit]:
    storage = open_storage(str(cache))
    manifest = Manifest.read(storage)
    found = [Commit.read(storage, shard, manifest.sha256) for shard in range(manifest.shards)]
    return [commit for commit in found if commit is not None]


def test_a_prepared_mask_gives_packed_pieces_what_they_have_alone(unequal: Path, tmp_path: Path) -> None:
    folder = make_odd(tmp_path / "gpt_oss", "gpt_oss")
    assert dump(dump_options(folder, unequal, tmp_path / "c", seq_len=128, limit_docs=20))["complete"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert max([require_alone(row, model) for row in open_cache(tmp_path / "c")]) > 2
    assert [commit.compute["mask"] for commit in commits(tmp_path / "c")] == ["prepared"]


def test_a_model_that_cannot_be_packed_is_told_the_way(unequal: Path, tmp_path: Path) -> None:
    folder = make_odd(tmp_path / "lfm2", "lfm2")
    with pytest.raises(
        IsolationError, match=r'it needs a cache dumped with pack="none", .* or with isolate=False'
    ) as e:
        dump(dump_options(folder, unequal, tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    shown = in_options(str(e.value), [field.name for field in dataclasses.fields(DumpConfig)])
    assert "a cache dumped with --pack none, where" in shown and "or with --no-isolate, where" in shown
    assert "\n" not in shown


def test_there_is_nothing_to_isolate(teacher: Path, unequal: Path, tmp_path: Path) -> None:
    options = {"pack": "none", "limit_docs": 6}
    dump(dump_options(teacher, unequal, tmp_path / "c", isolate=False, **options))
    assert dump(dump_options(teacher, unequal, tmp_path / "c", **options))["complete"]  # it is the same cache
    assert open_cache(tmp_path / "c").manifest.row_spec == RowSpec(
        vocab_size=320, seq_len=64, isolate=False, packed=False
    )


@pytest.mark.parametrize("rule", ["auto", "cut", "truncate", "drop"])
def test_what_becomes_of_long_documents(teacher: Path, unequal: Path, tmp_path: Path, rule: str) -> None:
    options = {"pack": "none", "limit_docs": 6, "seq_len": 60, "overlong": rule}
    made = dump(dump_options(teacher, unequal, tmp_path / "c", **options))["rows"]
    encode = AutoTokenizer.from_pretrained(teacher)
    lengths = [len(encode(json.loads(line)["text"])["input_ids"]) for line in unequal.read_text().splitlines()[:6]]
    pieces, fitting = sum(-(-(n - 1) // 60) for n in lengths), sum(n <= 60 for n in lengths)
    assert made == {"auto": pieces, "cut": pieces, "truncate": 6, "drop": fitting}[rule]
    assert 0 < fitting < 6 < pieces


def test_a_corpus_of_long_documents_is_refused_where_they_are_dropped(
    teacher: Path, unequal: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match="has a token to predict"):
        dump(dump_options(teacher, unequal, tmp_path / "c", seq_len=8, overlong="drop"))


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_is_as_long_as_its_longest_row(packed: bool) -> None:
    def row(length: int) -> PackedRow:
        return PackedRow(
            tokens=np.arange(length, dtype=np.int32), piece_lengths=np.array([length], np.int32),
            piece_documents=np.zeros(1, np.int64),
        )  # fmt: skip

    batch = Batch([row(5), row(9), row(2)], RowSpec(vocab_size=20, seq_len=16, isolate=packed, packed=packed))
    length = 16 if packed else 9
    assert batch.length == length
    assert batch.tokens.shape == batch.segments.shape == batch.position_ids.shape == (3, length)
    assert batch.counts == [4, 8, 1] and batch.labels.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    if not packed:  # one context a row, so that a model need not make a mask
        assert batch.position_ids.tolist() == [list(range(9))] * 3
