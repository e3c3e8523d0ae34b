"""What comes next after a prompt: from a live teacher, from the cache, or from the students alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.corpus.tokenise import Tokeniser
from kdcache.pretrained import load_tokenizer
from kdcache.report.prompt import find_prompt, next_tokens
from kdcache.teacher.dump import dump
from tests.making import TEXTS, dump_options

PROMPT = "The fox jumped"


def test_a_prompt_is_the_start_of_a_document(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    whole = tokenizer(TEXTS[0])["input_ids"]
    prompt = Tokeniser(tokenizer, len(tokenizer)).prompt(TEXTS[0][: len(PROMPT)])
    assert whole[0] == prompt[0] == tokenizer.bos_token_id and whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt and Tokeniser(tokenizer, len(tokenizer)).prompt(TEXTS[0]) == whole[:-1]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == PROMPT


def test_a_live_teacher_and_the_cache_say_the_same(cache: Path, teacher: Path) -> None:
    live = next_tokens([str(teacher)], str(cache), PROMPT, str(teacher), top=8, device="cpu")
    stored = next_tokens([str(teacher)], str(cache), PROMPT, top=8, device="cpu")
    tokens = [t["id"] for t in live["tokens"]]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(teacher)(torch.tensor([tokens])).logits[0, -1, :320]
    values, ids = logits.softmax(-1).topk(8)
    assert live["teacher"]["source"] == "live" and stored["teacher"]["source"] == "cache"
    for entries in (live["teacher"]["entries"], stored["teacher"]["entries"], *(
        s["entries"] for s in (*live["students"].values(), *stored["students"].values())
    )):  # fmt: skip
        assert [e["id"] for e in entries] == ids.tolist()
        assert [e["probability"] for e in entries] == pytest.approx(values.tolist(), abs=1e-5)
    row = open_cache(cache)[stored["teacher"]["row"]]
    end = stored["teacher"]["position"] + 1
    assert row.tokens[end - len(tokens) : end].tolist() == tokens
    assert len(set(row.segments[end - len(tokens) : end + 1].tolist())) == 1
    assert "".join(t["text"] for t in live["tokens"]) == "<s>" + PROMPT


def test_a_prompt_that_no_piece_begins_with_is_not_found(cache: Path, teacher: Path) -> None:
    answer = next_tokens([str(teacher)], str(cache), "Nobody said this", top=3, device="cpu")
    assert answer["teacher"]["source"] is None and answer["teacher"]["entries"] == []
    assert len(answer["students"][str(teacher)]["entries"]) == 3
    opened = open_cache(cache)
    row = opened.read_packed(0)[0]
    first, second = row.piece_lengths[:2].tolist()
    inside = row.tokens[1 : first - 1].tolist()  # it occurs, but after other tokens
    across = row.tokens[: first + second // 2].tolist()  # it is there in a row, but in two contexts
    assert find_prompt(opened, inside) is None and find_prompt(opened, across) is None
    assert find_prompt(opened, row.tokens[:first].tolist()) is None  # the whole piece: nothing comes next
    found = find_prompt(opened, row.tokens[: first - 1].tolist())
    assert found is not None and found[:2] == (0, first - 2)


def test_it_finds_the_target_of_that_very_slot(cache: Path) -> None:
    """Also behind other pieces, whose last slots have no target."""
    opened = open_cache(cache)
    behind = 0
    for number in range(0, len(opened), 5):
        row = opened.read_packed(number)[0]
        start = int(row.piece_lengths[0])
        for length in row.piece_lengths[1:].tolist():
            found = find_prompt(opened, row.tokens[start : start + length - 1].tolist()) if length > 1 else None
            if found is not None and found[:2] == (number, start + length - 2):
                expected = opened[number].targets[found[1]]
                assert torch.equal(found[2].ids, expected.ids) and torch.equal(found[2].weights, expected.weights)
                behind += 1
            start += length
    assert behind > 3


def test_sampled_shares_are_called_estimates(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "c", select="ipps", k=6, sample_temperature=2.0, limit_docs=9))
    told = next_tokens([str(teacher)], str(tmp_path / "c"), PROMPT, device="cpu")["teacher"]
    assert told["source"] == "cache" and told["sampled"] is True and told["temperature"] == 2
    assert sum(e["probability"] for e in told["entries"]) == pytest.approx(1, abs=0.05) and len(told["entries"]) == 6
