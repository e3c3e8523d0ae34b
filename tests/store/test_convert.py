"""A cache written anew holds what it held, or exactly what fewer entries leave of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.processes import kdcache


def shards(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((cache / "shards").iterdir())}


def content(cache: Path) -> str:
    report = verify_cache(cache)
    assert report.ok and report.content_sha256, report.problems
    return report.content_sha256


def test_there_and_back_is_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    there = convert(cache, tmp_path / "z", store="zarr")
    assert there["complete"] and there["shards"]["by_this_worker"] == there["shards"]["planned"]
    convert(tmp_path / "z", tmp_path / "a", store="arrow")
    assert content(cache) == content(tmp_path / "z") == content(tmp_path / "a")
    assert shards(tmp_path / "a") == shards(cache)


def test_fewer_entries_are_what_a_dump_of_so_many_keeps(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    for k in (8, 3):
        dump(dump_options(teacher, corpus, tmp_path / str(k), k=k, precision="float32"))
    convert(tmp_path / "8", tmp_path / "cut", k=3)
    for direct, cut in zip(open_cache(tmp_path / "3"), open_cache(tmp_path / "cut"), strict=True):
        assert torch.equal(direct.targets.ids, cut.targets.ids)
        for field in ("logprobs", "log_partition", "log_tail"):  # the two sum the same terms in another order
            one, other = getattr(direct.targets, field), getattr(cut.targets, field)
            torch.testing.assert_close(one, other, rtol=0, atol=3e-6)


def test_another_precision_is_what_a_dump_in_it_stores(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    for precision in ("float32", "6"):
        dump(dump_options(teacher, corpus, tmp_path / precision, precision=precision))
    convert(tmp_path / "float32", tmp_path / "cut", precision="6")
    assert content(tmp_path / "cut") == content(tmp_path / "6")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"select": "ipps", "k": 6}, {"select": "sample", "draws": 20}, {"select": "topp", "top_p": 0.9}]
)
def test_sampled_and_ragged_caches(teacher: Path, corpus: Path, tmp_path: Path, options: dict[str, object]) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "c", precision="6", **options))
    convert(tmp_path / "c", tmp_path / "z", store="zarr")
    assert content(tmp_path / "c") == content(tmp_path / "z")
    small = convert(tmp_path / "c", tmp_path / "small", k=4)
    assert verify_cache(tmp_path / "small").ok
    assert small["entries"] <= 4 * small["positions"]
    for row in open_cache(tmp_path / "small"):
        targets = row.targets[row.targets.count > 0]
        if options["select"] != "topp":
            torch.testing.assert_close(targets.weights.sum(-1), torch.ones(len(targets.count)), rtol=0, atol=1e-5)


def test_it_goes_on_where_it_was_and_workers_share(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path / "c", store="zarr", worker="1/2")
    with pytest.raises(CacheMismatchError, match="another configuration"):
        convert(cache, tmp_path / "c", store="arrow")
    rest = convert(cache, tmp_path / "c", store="zarr")
    assert rest["complete"] and 0 < rest["shards"]["by_this_worker"] < rest["shards"]["planned"]
    assert content(tmp_path / "c") == content(cache)


def test_what_cannot_be_done_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k is 9"):
        convert(cache, tmp_path / "c", k=9)
    with pytest.raises(ConfigError, match="store tape is not one of arrow, zarr"):
        convert(cache, tmp_path / "c", store="tape")
    with pytest.raises(ConfigError, match="precision is 3"):
        convert(cache, tmp_path / "c", precision="3")
    assert not (tmp_path / "c").exists()


def test_damage_does_not_travel(cache: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(cache, tmp_path / "broken")
    path = tmp_path / "broken/shards/00001.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd", len(data) // 3) + 9] ^= 16  # in a frame: between them lies padding
    path.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"00001\.arrow"):
        convert(tmp_path / "broken", tmp_path / "c", store="zarr")
    assert not (tmp_path / "c/commits/00001.json").exists()


def test_the_command(cache: Path, tmp_path: Path) -> None:
    done = kdcache("convert", cache, "--out", tmp_path / "c", "--store", "zarr", "--k", "4", "--json")
    summary = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert summary["complete"] and summary["entries"] == 4 * summary["positions"]
