"""The page about extending has the code of the examples, and what it says of extras, divergences and stores works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import Selection, open_cache, select
from kdcache.plugins import VARIABLE
from tests.examples.loading import EXAMPLES
from tests.processes import kdcache

PAGE = (EXAMPLES.parent / "docs" / "extending.md").read_text()
BLOCKS = [block.partition("```")[0] for block in PAGE.split("```python\n")[1:]]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "extending").glob("*.py")), ids=lambda path: path.stem)
def test_the_page_has_the_code_of_each_example(path: Path) -> None:
    assert path.read_text() in BLOCKS


@pytest.mark.slow
def test_a_divergence_and_a_store_through_every_command(cache: Path, student_config: Path, tmp_path: Path) -> None:
    lines, loss = (EXAMPLES / "extending" / name for name in ("lines_store.py", "hellinger.py"))
    copy, student = tmp_path / "c", tmp_path / "s"
    done = kdcache("convert", cache, "--out", copy, "--plugin", lines, "--store", "lines", "--json")
    assert done.returncode == 0, done.stderr
    refused = kdcache("verify", copy)
    assert refused.returncode != 0 and "store lines is not one of arrow, zarr" in refused.stdout + refused.stderr
    assert kdcache("verify", copy, "--plugin", lines).returncode == 0
    assert kdcache("inspect-shard", copy, "--row", 0, "--plugin", lines).returncode == 0
    train = (
        "train-student", "--cache", copy, "--student", student_config, "--out", student, "--steps", 2,
        "--batch-rows", 2, "--loss", "hellinger", "--device", "cpu", "--plugin", lines,
    )  # fmt: skip
    refused = kdcache(*train)
    assert refused.returncode == 2 and "loss hellinger is not one of forward-kl" in refused.stderr
    done = kdcache(*train, "--readers", 1, "--plugin", loss)  # the reader is a process of its own
    assert done.returncode == 0, done.stderr
    back = kdcache("convert", copy, "--out", tmp_path / "z", "--plugin", lines, "--store", "zarr", "--json")
    assert back.returncode == 0, back.stderr
    one, two = (open_cache(folder).commits for folder in (cache, tmp_path / "z"))
    assert [c.content_sha256 for c in one.values()] == [c.content_sha256 for c in two.values()]


def test_an_extra_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    writing, matching = (
        next(b for b in BLOCKS if b.startswith(start)) for start in ("from kdcache import Ex", "def m")
    )
    generator = torch.Generator().manual_seed(0)
    tokens, vectors = torch.randint(0, 256, (30,), generator=generator), torch.randn(30, 64, generator=generator)
    targets = select(torch.randn(29, 256, generator=generator), Selection(k=8), labels=tokens[1:])
    names: dict[str, Any] = {"tokens": tokens, "targets": targets, "vectors": vectors}
    exec(writing.replace("my-cache", str(tmp_path / "c")), names)
    row = open_cache(tmp_path / "c")[0]
    found = row.extras["attention:7"]
    assert found.shape == (128, 64) and found[30:].isnan().all()
    assert (found[:30] - vectors).abs().max() <= vectors.abs().max() / 127 / 2 + 1e-6
    exec(matching, names)
    hidden = torch.zeros(1, 128, 64)
    loss = names["match"](hidden, {"extras": {"attention:7": found[None]}})
    assert loss.item() == pytest.approx(found[:30].square().mean().item(), rel=1e-5)
