"""docs/reading.md: its recipes are run, and what they read is what the teacher said."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.convert import convert
from kdcache.errors import CacheError
from kdcache.interop.export import export
from kdcache.isolation import packed_forward
from kdcache.rows import position_ids
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.objects import Bucket

PAGE = Path(__file__).parents[2] / "docs/reading.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
ROW = 3


@pytest.fixture(scope="module")
def folder(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    dump(dump_options(teacher, corpus, folder / "cache", precision="float16", k=8))
    convert(folder / "cache", folder / "cache-zarr", store="zarr")
    export(folder / "cache", folder / "targets.parquet", "parquet")
    export(folder / "cache", folder / "targets-zarr", "zarr")
    return folder


RECIPES = (
    "pyarrow", "polars", "duckdb", "zarr", "pandas", "polars-table", "duckdb-table", "xarray", "datasets-table",
    "torch", "datasets",
)  # fmt: skip


@pytest.mark.parametrize("recipe", BLOCKS[1:], ids=RECIPES)
def test_a_recipe_gives_the_teachers_numbers(
    teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "hf"))
    if "xarray" in recipe:
        pytest.importorskip("xarray")
    names: dict[str, Any] = {}
    exec(BLOCKS[0] + recipe, names)
    cache = open_cache("cache")
    row = cache[ROW]
    has = row.targets.count > 0
    assert np.array_equal(names["tokens"], row.tokens[row.segments >= 0])
    assert np.array_equal(names["ids"], row.targets.ids[has])
    np.testing.assert_allclose(names["logp"], row.targets.logprobs[has], atol=2e-6)
    if "slots" in names:
        assert np.array_equal(names["slots"], np.flatnonzero(has))
    if "surprising" in names:
        surprises = [-float(v) for each in cache for v in each.targets.label_logprob[each.targets.count > 0]]
        assert [s for _, _, s in names["surprising"]] == pytest.approx(sorted(surprises, reverse=True)[:10])
    if "proposed" in names:
        wanted = Counter(i for packed in cache for i in packed.targets.ids[packed.targets.count > 0].flatten().tolist())
        found = names["proposed"]
        if not isinstance(found, list):  # polars read the first shard alone
            first = [cache[i] for i in range(cache.commits[0].rows)]
            wanted = Counter(i for one in first for i in one.targets.ids[one.targets.count > 0].flatten().tolist())
            found = found.rows()
        assert dict(found) == wanted
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        places = torch.from_numpy(position_ids(row.segments.numpy()))
        logits = packed_forward(model, row.tokens[None], places[None]).logits[0, has, : cache.manifest.vocab_size]
    own = logits.double().log_softmax(-1).gather(-1, torch.from_numpy(names["ids"].astype(np.int64)))
    np.testing.assert_allclose(names["logp"], own, atol=2.1e-3)


def test_the_group_is_zarrs_own_and_read_only(folder: Path) -> None:
    cache = open_cache(folder / "cache-zarr")
    group = cache.zarr_group(0)
    assert isinstance(group, zarr.Group) and group.read_only
    assert group["tokens"].shape[0] == cache.commits[0].rows
    with pytest.raises(ValueError, match="read-only"):
        group["tokens"][0] = 0
    with pytest.raises(CacheError, match="has no committed shard 99"):
        cache.zarr_group(99)
    with pytest.raises(CacheError, match="is in the arrow store and holds no zarr groups"):
        open_cache(folder / "cache").zarr_group(0)


@pytest.mark.slow
def test_the_group_of_a_cache_in_a_bucket(folder: Path, bucket: Bucket) -> None:
    convert(folder / "cache", f"{bucket.url}/z", store="zarr")
    cache = open_cache(f"{bucket.url}/z")
    group = cache.zarr_group(0)
    local = open_cache(folder / "cache-zarr").zarr_group(0)
    assert np.array_equal(group["ids"][:], local["ids"][:])
    assert group.read_only
