"""A summary from the sums in the commits, against one that reads every row, and against float64 sums of the targets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import open_cache
from kdcache.report.inspect import inspect_summary
from kdcache.store.local import LocalStorage
from kdcache.store.seal import unseal
from kdcache.store.sealed_json import seal
from kdcache.store.target_sums import TargetSums
from kdcache.testing.example_rows import SELECTIONS, example_manifest, example_rows, write_cache

MEANS = ("mean_kept_mass", "mean_tail", "mean_entropy", "teacher_nll")


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("precision", ["float32", "float16", "6"])
def test_sums_and_rows_agree_to_what_the_codec_rounds(tmp_path: Path, kind: str, precision: str) -> None:
    manifest = example_manifest("arrow", selection=SELECTIONS[kind], precision=precision)
    rows = example_rows(manifest, 5)
    write_cache(LocalStorage(tmp_path), manifest, rows)
    said, read = inspect_summary(str(tmp_path)), inspect_summary(str(tmp_path), exact=True)
    assert (said.pop("exact"), read.pop("exact")) == (False, True)
    for name in MEANS:
        one, two = said.pop(name), read.pop(name)
        tolerance = {"float32": 1e-6, "float16": 1e-6, "6": 1 / 128}[precision]
        assert (one is None) == (two is None)
        assert one is None or one == pytest.approx(two, abs=tolerance, rel=1e-6)
    assert said == read
    truth = torch.cat([t.entropy[t.count > 0].double() for _, t in rows])
    assert inspect_summary(str(tmp_path))["mean_entropy"] == pytest.approx(truth.mean().item(), rel=1e-14)
    counts = torch.cat([t.count[t.count > 0] for _, t in rows])
    assert said["entries_per_position"] == {"least": int(counts.min()), "most": int(counts.max())}


def test_a_summary_reads_no_row(cache: Path, tmp_path: Path) -> None:
    expected = inspect_summary(str(cache))
    copy = tmp_path / "c"
    shutil.copytree(cache, copy)
    shutil.rmtree(copy / "shards")
    shutil.rmtree(copy / "commits")
    assert inspect_summary(str(copy)) == {**expected, "cache": str(copy)}
    one = inspect_summary(str(copy), 2)
    assert one["shard"] == 2 and one["rows"] == open_cache(cache).commits[2].rows and one["shards"]["committed"] == 4


def test_progress_is_told_while_rows_are_read(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    inspect_summary(str(cache), exact=True, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(open_cache(cache)), len(open_cache(cache))) and len(seen) > 3
    seen.clear()
    inspect_summary(str(cache), on_progress=lambda done, total: seen.append((done, total)))
    assert not seen


def test_what_is_unknown_is_said_to_be(cache: Path, tmp_path: Path) -> None:
    from kdcache_cli.main import app
    from typer.testing import CliRunner

    copy = Path(shutil.copytree(cache, tmp_path / "c"))
    unseal(LocalStorage(copy))
    path = copy / "commits/00001.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    fields |= {"sums": {**fields["sums"], "entropy": None, "label_logprob": None}, "entropy_histogram": None}
    path.write_bytes(seal(fields))
    summary = inspect_summary(str(copy))
    assert summary["mean_entropy"] is summary["teacher_nll"] is summary["entropy_quantiles"] is None
    assert summary["mean_tail"] == inspect_summary(str(cache))["mean_tail"]
    shown = CliRunner().invoke(app, ["inspect-shard", str(copy)]).stdout
    assert len(re.findall(r" unknown\s", shown)) == 3


def test_sums_depend_on_rows_and_order_alone_and_lose_nothing() -> None:
    """A thousand rows of very unlike size, against exact fractions."""
    from fractions import Fraction

    manifest = example_manifest("arrow", selection=SELECTIONS["topk"])
    (_, targets), *_ = example_rows(manifest, 1)
    sums, exact = TargetSums(), Fraction(0)
    for row in range(1000):
        factor = 10.0 ** (row % 13 - 6)
        changed = type(targets)(**{**vars(targets), "entropy": targets.entropy.double() * factor})
        sums.add(changed)
        values = changed.entropy[changed.count > 0].numpy()
        exact += sum(map(Fraction, map(float, values)), Fraction(0))
    said = sums.fields()["entropy"]
    assert abs(Fraction(said) - exact) <= exact * Fraction(np.finfo(float).eps)
    assert TargetSums().fields() == {"entropy": None, "label_logprob": None, "tail_mass": None}
