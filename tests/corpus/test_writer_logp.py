"""Records of tokens that say with which log-probability each was drawn: what they may say, and what packing keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.documents import BadDocument
from kdcache.corpus.packing import Tokens, pack
from kdcache.corpus.token_records import read_tokens
from kdcache.errors import ConfigError
from kdcache.teacher.dump import dump
from tests.making import dump_options

IDS, MASK, LOGP = [5, 6, 7, 8], [0, 0, 1, 1], [None, None, -0.5, -1.25]


def record(**changes: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "completion_mask": MASK, "writer_logp": LOGP, **changes}


def test_they_are_read_as_they_are() -> None:
    found = read_tokens(record())
    assert found is not None and found.writer_logp is not None and found.writer_logp.dtype == np.float32
    assert np.isnan(found.writer_logp[:2]).all() and found.writer_logp[2:].tolist() == [-0.5, -1.25]
    padded = read_tokens(record(attention_mask=[0, 1, 1, 1]))
    assert padded is not None and padded.writer_logp is not None and len(padded.writer_logp) == len(padded.ids) == 3
    first = read_tokens({"input_ids": IDS, "writer_logp": [None, -1, -2, -3]})  # no token predicts the first
    assert first is not None and first.supervised is None
    assert read_tokens({"input_ids": IDS}).writer_logp is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("logp", "reason"),
    [
        (None, "no writer_logp: it is null, and other records have it"),
        ([None, None, -0.5], "unequal lengths: 4 input_ids, 3 in writer_logp"),
        ([None, None, -0.5, None], "no writer_logp: a token that may be a label has none"),
        ([None, None, -0.5, 0.1], "wrong numbers: writer_logp holds one that is no logarithm of a probability"),
        ([None, None, -0.5, -math.inf], "wrong numbers: writer_logp holds one that is no logarithm of a probability"),
        ([None, None, -0.5, "x"], "wrong type: writer_logp holds something else than numbers"),
        (-0.5, "wrong type: writer_logp holds something else than numbers"),
        ([[-0.5], [-0.5], [-0.5], [-0.5]], "unequal lengths: 4 input_ids, 4 in writer_logp|wrong type"),
    ],
)
def test_what_they_may_not_say(logp: Any, reason: str) -> None:
    with pytest.raises(BadDocument, match=reason):
        read_tokens(record(writer_logp=logp))


def test_packing_keeps_each_at_its_token() -> None:
    rng = np.random.default_rng(0)
    documents = [
        Tokens(
            document=number, ids=rng.integers(0, 99, length).astype(np.int32),
            writer_logp=-rng.random(length).astype(np.float32),
        )
        for number, length in enumerate((5, 30, 3, 12, 7))
    ]  # fmt: skip
    seen = 0
    for row in pack(documents, 16).rows:
        starts = np.cumsum(row.piece_lengths) - row.piece_lengths
        for start, length, number in zip(starts, row.piece_lengths, row.piece_documents, strict=True):
            ids, logp = row.tokens[start : start + length], row.extras["writer_logp"][start : start + length, 0]
            own = documents[number]
            at = next(i for i in range(len(own.ids)) if own.ids[i : i + length].tolist() == ids.tolist())
            assert own.writer_logp is not None and (own.writer_logp[at : at + length] == logp).all()
            seen += length
    assert seen == 57


def test_they_are_not_copied_from_another_cache(teacher: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(
        '{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "writer_logp": [null, -1, -2]}\n'
    )
    with pytest.raises(ConfigError, match=r"reuse copies what other caches hold, but .*c\.jsonl brings its own writer"):
        dump(dump_options(teacher, tmp_path / "c.jsonl", tmp_path / "out", reuse=(str(cache),)))
    assert not (tmp_path / "out").exists()
