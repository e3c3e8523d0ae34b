"""Hidden states of a teacher in its cache: the ones that its output head is given, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcache import open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.processes import kdcache


@torch.inference_mode()
def own_states(folder: Path, tokens: Tensor) -> Tensor:
    """`[n, D]` what the output head of a model is given for one piece, run alone in the plainest way."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    model(tokens[None])
    return seen[0]


def relative_errors(cache: Path, folder: Path, rows: int) -> Tensor:
    """`[tokens]` how far each stored vector is from the model's own, as a part of its length."""
    found = []
    for row in (open_cache(cache)[i] for i in range(rows)):
        for piece in range(int(row.segments.max()) + 1):
            own, stored = own_states(folder, row.tokens[row.segments == piece]), row.extras["hidden:-1"]
            found.append((stored[row.segments == piece] - own).norm(dim=-1) / own.norm(dim=-1))
        assert stored[row.segments < 0].isnan().all()
    return torch.cat(found)


@pytest.mark.parametrize("store", ["arrow", "zarr"])
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("float32", 1e-5)])
def test_they_are_the_models_own(
    teacher: Path, corpus: Path, tmp_path: Path, store: str, precision: str, bound: float
) -> None:
    summary = dump(
        dump_options(
            teacher, corpus, tmp_path / "c", store=store, extra=("hidden:-1",), extra_precision=precision, limit_docs=20
        )
    )
    assert summary["extras"] == {"hidden:-1": {"width": 32, "dtype": "float32", "precision": precision, "per": "token"}}
    assert verify_cache(tmp_path / "c").ok
    errors = relative_errors(tmp_path / "c", teacher, rows=3)
    assert len(errors) > 100 and errors.mean() < bound
    other = {"arrow": "zarr", "zarr": "arrow"}[store]
    convert(tmp_path / "c", tmp_path / "d", store=other)
    for one, two in zip(open_cache(tmp_path / "c"), open_cache(tmp_path / "d"), strict=True):
        torch.testing.assert_close(one.extras["hidden:-1"], two.extras["hidden:-1"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.assets
def test_of_a_trained_teacher(assets: Path, tmp_path: Path) -> None:
    teacher = assets / "models/stories260K"
    dump(
        dump_options(
            teacher,
            assets / "text/tinystories.txt",
            tmp_path / "c",
            extra=("hidden:-1",),
            extra_precision="int8",
            limit_docs=30,
            seq_len=256,
        )
    )
    errors = relative_errors(tmp_path / "c", teacher, rows=2)
    assert len(errors) > 300 and errors.mean() < 0.01


def test_targets_and_workers_are_as_without(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"extra": ("hidden:-1",), "limit_docs": 70}
    dump(dump_options(teacher, corpus, tmp_path / "plain", limit_docs=70))
    for worker in ("1/2", "0/2"):
        dump(dump_options(teacher, corpus, tmp_path / "c", worker=worker, **options))
    for one, two in zip(open_cache(tmp_path / "plain"), open_cache(tmp_path / "c"), strict=True):
        assert torch.equal(one.targets.weights, two.targets.weights) and "hidden:-1" in two.extras


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": ("hidden:3",)}, "extra is hidden:3, but the engine transformers offers hidden:-1"),
        ({"extra": ("attention",)}, "extra is attention, but the engine transformers offers hidden:-1"),
        ({"extra": ("hidden:-1", "hidden:-1")}, "extra names one array twice"),
        ({"extra": ("hidden:-1",), "extra_precision": "int4"}, "extra_precision int4 is not one of float32, float16"),
        ({"extra": ("hidden:-1",), "tile_head": False}, "is what the output head is given, so it needs the head in"),
    ],
)
def test_what_there_is_not(teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dump(dump_options(teacher, corpus, tmp_path / "c", **changes))
    assert not (tmp_path / "c").exists()


def test_the_command(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = kdcache(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", tmp_path / "c", "--seq-len", "64",
        "--k", "8", "--limit-docs", "10", "--extra", "hidden:-1", "--extra-precision", "bfloat16", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extras"]["hidden:-1"]["precision"] == "bfloat16"
