"""Records of servers and of axolotl in each of their forms: which slot a list belongs to, and which entries count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache import open_cache
from kdcache.errors import CorpusError
from kdcache.interop.axolotl import AxolotlCache
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.import_rows import import_cache
from kdcache.interop.topk_jsonl import TopkJsonl

TOKENS = [5, 7, 2, 9]


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def targets(row: ForeignRow) -> dict[int, dict[int, float]]:
    """By slot, the entries."""
    return {
        int(slot): dict(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
        for slot, ids, values, count in zip(row.slots, row.ids, row.values, row.count, strict=True)
    }


VLLM = [
    None,
    {"7": {"logprob": -0.1, "rank": 1}, "3": {"logprob": -3.0, "rank": 2}},
    {"8": {"logprob": -0.2, "rank": 1}, "4": {"logprob": -2.0, "rank": 2}, "2": {"logprob": -6.0, "rank": 17}},
    {"1": {"logprob": -0.7, "rank": 1}, "9": {"logprob": -0.8, "rank": 2}},
]
OPENAI = [None, *({f"token_id:{i}": v["logprob"] for i, v in each.items()} for each in VLLM[1:] if each)]
WANTED = {0: {7: -0.1, 3: -3.0}, 1: {8: -0.2, 4: -2.0}, 2: {1: -0.7, 9: -0.8}}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt_token_ids": TOKENS, "prompt_logprobs": VLLM},
        {"choices": [{"prompt_token_ids": TOKENS, "prompt_logprobs": VLLM}]},
        {"tokens": TOKENS, "choices": [{"logprobs": {"top_logprobs": OPENAI}}]},
        {"input_ids": TOKENS, "logprobs": {"top_logprobs": OPENAI}},
    ],
    ids=["vllm", "vllm answer", "openai answer", "openai"],
)
def test_a_list_is_the_target_of_the_slot_before(tmp_path: Path, record: dict[str, Any]) -> None:
    (row,) = TopkJsonl(lines(tmp_path / "a.jsonl", record)).rows()
    assert targets(row) == WANTED
    assert row.label_logprob is not None and row.label_logprob.tolist() == [-0.1, -6.0, -0.8]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt_logprobs": VLLM}, "has no token ids"),
        ({"tokens": TOKENS}, "has no list of log-probabilities"),
        ({"tokens": TOKENS[:2], "prompt_logprobs": VLLM}, "for each of its 2 tokens"),
        ({"tokens": TOKENS[:2], "prompt_logprobs": [None, {"the": -0.1}]}, "names tokens by their text"),
        ({"tokens": TOKENS[:2], "prompt_logprobs": [None, {"7": "often"}]}, "is no number"),
        ({"tokens": TOKENS[:2], "prompt_logprobs": [None, [1, 2]]}, "names no tokens"),
        ({"tokens": [[1]], "prompt_logprobs": [None]}, "no list of integers"),
    ],
)
def test_an_answer_that_says_too_little_is_named(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        list(TopkJsonl(lines(tmp_path / "a.jsonl", {"tokens": TOKENS, "prompt_logprobs": VLLM}, record)).rows())


def test_axolotl_prepared_and_raw(tmp_path: Path) -> None:
    prepared = {
        "input_ids": TOKENS, "labels": [-100, -100, 2, 9],
        "target_token_ids": [[0, 1], [0, 1], [8, 4], [1, 9]],
        "target_logprobs": [[-1e9] * 2, [-1e9] * 2, [-0.2, -2.0], [-0.7, -0.8]],
        "target_mask": [[0, 0], [0, 0], [1, 1], [1, 1]],
    }  # fmt: skip
    (row,) = AxolotlCache(lines(tmp_path / "p.jsonl", prepared)).rows()
    assert targets(row) == {1: WANTED[1], 2: WANTED[2]}
    raw = {
        "input_ids": TOKENS,
        "logprobs": [
            [{"token": "token_id:8", "logprob": -0.2}, {"token": "token_id:4", "logprob": -2.0}],
            [{"token": "token_id:1", "logprob": -0.7}, {"token": "token_id:9", "logprob": -0.8}],
        ],
    }
    source = lines(tmp_path / "r.jsonl", raw)
    (row,) = AxolotlCache(source).rows()
    assert targets(row) == {1: WANTED[1], 2: WANTED[2]}

    summary = import_cache(source, tmp_path / "c", "axolotl", teacher="t", vocab_size=10, precision="float32")
    assert summary["positions"] == 2 and not summary["renormalised"]
    written = open_cache(tmp_path / "c")[0]
    assert written.labels.tolist() == [-100, 2, 9, -100]  # only what has a target may be learned
    np.testing.assert_allclose(written.targets.logprobs[1], [-0.2, -2.0], atol=1e-6)
    with pytest.raises(CorpusError, match="let `axolotl preprocess` prepare it first"):
        AxolotlCache(lines(tmp_path / "m.jsonl", {"messages": [], "logprobs": []}))


def test_rounded_masses_are_scaled_and_told(tmp_path: Path) -> None:
    answer = {"tokens": [1, 2], "prompt_logprobs": [None, {"2": -0.01, "3": -4.0}]}
    summary = import_cache(
        lines(tmp_path / "a.jsonl", answer), tmp_path / "c", "topk-jsonl", teacher="t", vocab_size=10,
        precision="float32",
    )  # fmt: skip
    assert summary["scaled_positions"] == 1 and summary["largest_mass"] == pytest.approx(1.0084, abs=1e-3)
    assert float(open_cache(tmp_path / "c")[0].targets.weights[0].sum()) == pytest.approx(1)
    with pytest.raises(CorpusError, match="its values are no log-probabilities"):
        wrong = {"tokens": [1, 2], "prompt_logprobs": [None, {"2": 5.0, "3": 4.0}]}
        import_cache(lines(tmp_path / "b.jsonl", wrong), tmp_path / "d", "topk-jsonl", teacher="t", vocab_size=10)
