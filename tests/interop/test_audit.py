"""An audit finds each fault that is planted in each format, and none in a cache that has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kdcache_cli.main import app
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kdcache import Selection, SparseTargets, create_cache
from kdcache.errors import ConfigError
from kdcache.interop.formats import READ, find_format
from kdcache.known import Known
from kdcache.report.audit import audit, audit_rows, guess_format, sample_rows
from kdcache.rows import RowSpec
from kdcache.teacher.engines.base import TeacherSpec
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher
from tests.interop import foreign_writers
from tests.interop.foreign_writers import VOCABULARY, Row, Written

pytestmark = pytest.mark.assets

K, ROWS, PIECE = 12, 6, (41, 37, 30)


@dataclass
class Text:
    """Rows of real text, what the teacher says of them alone and of the whole row, and what another teacher says."""

    tokenizer: Any
    folder: Path
    opened: OpenedTeacher
    rows: list[np.ndarray]
    alone: list[torch.Tensor]  # [n, V] log p
    together: list[torch.Tensor]
    other: list[torch.Tensor]


@pytest.fixture(scope="module")
def text(assets: Path) -> Iterator[Text]:
    folder = assets / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = (assets / "text/tinystories.txt").read_text()[:40_000].split("\n\n")
    ids = [[tokenizer.bos_token_id, *tokenizer(s, add_special_tokens=False)["input_ids"]] for s in stories]
    long = iter([each for each in ids if len(each) >= max(PIECE)])
    rows = [np.concatenate([np.array(next(long)[:n]) for n in PIECE]) for _ in range(ROWS)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    cuts = np.cumsum(PIECE)[:-1]

    @torch.no_grad()
    def logp(tokens: np.ndarray) -> torch.Tensor:
        return model(torch.from_numpy(tokens)[None]).logits[0].double().log_softmax(-1)

    together = [logp(row) for row in rows]
    alone = [torch.cat([logp(part) for part in np.split(row, cuts)]) for row in rows]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    other = [torch.cat([logp(part) for part in np.split(row, cuts)]) for row in rows]
    spec = RowSpec(vocab_size=VOCABULARY, seq_len=sum(PIECE))
    with open_teacher(TeacherSpec(model=str(folder), device="cpu", batch_rows=1), spec) as opened:
        yield Text(tokenizer, folder, opened, rows, alone, together, other)


def entries(
    text: Text, logp: list[torch.Tensor], change: Callable[[np.ndarray], np.ndarray] = lambda v: v
) -> list[Row]:
    """Rows with the K largest of each slot."""
    found = []
    for tokens, each in zip(text.rows, logp, strict=True):
        values, ids = each.topk(K)
        found.append((tokens, list(PIECE), ids.numpy(), change(values.numpy())))
    return found


def clean(text: Text) -> list[Row]:
    return entries(text, text.alone)


def late(text: Text) -> list[Row]:
    return [(t, p, np.roll(ids, 1, 0), np.roll(v, 1, 0)) for t, p, ids, v in clean(text)]


def early(text: Text) -> list[Row]:
    return [(t, p, np.roll(ids, -1, 0), np.roll(v, -1, 0)) for t, p, ids, v in clean(text)]


def renormalised(text: Text) -> list[Row]:
    return entries(text, text.alone, lambda v: v - np.log(np.exp(v).sum(-1, keepdims=True)) - 1e-9)


def softened(text: Text) -> list[Row]:
    return entries(text, [(each / 2).log_softmax(-1) for each in text.alone])


def of_another_teacher(text: Text) -> list[Row]:
    return entries(text, text.other)


def leaking(text: Text) -> list[Row]:
    return entries(text, text.together)


def rounded(text: Text) -> list[Row]:
    return entries(text, text.alone, lambda v: np.where(np.exp(v) < 0.5 / 127, -100.0, v))


def of_another_tokenizer(text: Text) -> list[Row]:
    ids = np.random.default_rng(0).permutation(VOCABULARY)
    ids = np.where(ids == text.tokenizer.bos_token_id, ids[text.tokenizer.bos_token_id], ids)
    ids[text.tokenizer.bos_token_id] = text.tokenizer.bos_token_id
    return [(ids[t], p, ids[i], v) for t, p, i, v in clean(text)]


def own(folder: Path, rows: list[Row], tail: bool = True) -> Written:
    """A cache of kdcache, of ready entries."""
    writer = create_cache(
        folder / "c", vocab_size=VOCABULARY, seq_len=sum(PIECE), selection=Selection(k=K), shards=1, teacher="t",
        documents=ROWS, precision="float32",
        known=Known(entropy=False, label_logprob=False, tails=(1.0,), tail_sum="remainder"),
    )  # fmt: skip
    with writer.shard(0) as shard:
        for tokens, pieces, ids, logp in rows:
            targets = SparseTargets.from_topk(torch.from_numpy(ids), torch.from_numpy(logp))
            if not tail:
                assert targets.log_tail is not None
                targets.log_tail.fill_(-torch.inf)
            shard.write(tokens, targets, piece_lengths=pieces, documents=[0] * len(pieces))
    writer.finish()
    return folder / "c", None


WRITERS: dict[str, Callable[[Path, list[Row]], Written]] = {
    "kdcache": own, "megatron": foreign_writers.megatron, "distillkit": foreign_writers.distillkit,
    "topk-jsonl": foreign_writers.topk_jsonl, "axolotl": foreign_writers.axolotl, "maxtext": foreign_writers.maxtext,
    "se-kd": foreign_writers.sekd,
}  # fmt: skip

PLANTED: dict[str, tuple[Callable[[Text], list[Row]], set[str]]] = {
    "clean": (clean, set()),
    "late": (late, {"shift"}),
    "early": (early, {"shift"}),
    "renormalised": (renormalised, {"renormalised", "tail"}),
    "softened": (softened, {"temperature"}),
    "teacher": (of_another_teacher, {"teacher"}),
    "leaking": (leaking, {"leak"}),
    "rounded": (rounded, {"rounding"}),
    "tokenizer": (of_another_tokenizer, {"tokenizer", "teacher"}),
}
NOT_THERE = {
    "maxtext": {"renormalised"},  # logits have no mass that could be 1
    "se-kd": {"renormalised", "softened", "rounded"},  # draws add up to 1; what rounds them has a test of its own
}


def faults(text: Text, form: str, written: Written) -> dict[str, dict[str, Any]]:
    """Checks by name, of all rows."""
    path, tokens = written
    cache = find_format(form, READ).open(str(path), None if tokens is None else str(tokens))
    checks, positions = audit_rows(cache, sample_rows(cache, ROWS, 0), text.opened, text.tokenizer)
    assert positions > 400
    return {each["name"]: each for each in checks}


@pytest.mark.slow
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_no_other(text: Text, tmp_path: Path, form: str, fault: str) -> None:
    if fault in NOT_THERE.get(form, ()):
        return
    plant, wanted = PLANTED[fault]
    checks = faults(text, form, WRITERS[form](tmp_path, plant(text)))
    found = {name for name, each in checks.items() if each["verdict"] == "fault"}
    if fault == "tokenizer":
        assert "tokenizer" in found
    elif fault == "softened":
        assert "temperature" in found and checks["temperature"]["temperature"] == pytest.approx(2, abs=0.05)
    else:
        assert found == wanted, checks


def test_a_clean_cache_passes_and_a_shifted_one_does_not(text: Text, tmp_path: Path) -> None:
    path, _ = foreign_writers.topk_jsonl(tmp_path, clean(text))
    done = CliRunner().invoke(app, ["audit", str(path), "--teacher", str(text.folder), "--json", "--device", "cpu"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["ok"] and found["format"] == "topk-jsonl" and found["rows"] == ROWS
    (tmp_path / "late").mkdir()
    path, _ = foreign_writers.topk_jsonl(tmp_path / "late", late(text))
    done = CliRunner().invoke(app, ["audit", str(path), "--teacher", str(text.folder), "--device", "cpu"])
    assert done.exit_code == 1 and "one slot late" in " ".join(done.stdout.split()) and "faults found" in done.stdout


def test_a_missing_tail_of_our_own_is_found(text: Text, tmp_path: Path) -> None:
    checks = faults(text, "kdcache", own(tmp_path, clean(text), tail=False))
    assert {name for name, each in checks.items() if each["verdict"] == "fault"} == {"tail"}


def test_shares_that_are_rounded_to_nothing_are_found(text: Text, tmp_path: Path) -> None:
    def coarse(counts: np.ndarray) -> np.ndarray:
        return np.where(counts < 2, 0, np.round(counts / 50 * 127)).astype(int)

    checks = faults(text, "se-kd", foreign_writers.sekd(tmp_path, clean(text), coarse))
    assert checks["rounding"]["verdict"] == "fault" and checks["rounding"]["zero_share"] > 0.1


def test_ids_of_a_larger_vocabulary_are_found_without_a_teacher(text: Text, tmp_path: Path) -> None:
    rows = [(t, p, i + 400, v) for t, p, i, v in clean(text)]
    path, _ = foreign_writers.topk_jsonl(tmp_path, rows)
    found = audit(str(path), str(text.folder), device="cpu")
    assert not found["ok"] and [each["name"] for each in found["checks"]] == ["tokenizer"]
    assert "outside the teacher's vocabulary of 512" in found["checks"][0]["what"]


def test_a_format_is_guessed_by_its_files(text: Text, tmp_path: Path) -> None:
    rows = clean(text)[:2]
    for form in ("megatron", "distillkit", "topk-jsonl", "maxtext", "se-kd", "kdcache"):
        folder = tmp_path / form
        folder.mkdir()
        assert guess_format(str(WRITERS[form](folder, rows)[0])) == form
    with pytest.raises(ConfigError, match="does not look like any of"):
        guess_format(str(tmp_path))
