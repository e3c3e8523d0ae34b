"""`verify --teacher` knows a cache that says what its teacher says from one that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.errors import ModelError
from kdcache.report.faithfulness import check_faithfulness, differences
from kdcache.store.local import LocalStorage
from kdcache.store.publish import new_shard, publish_manifest, publish_shard
from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model, make_tokenizer
from tests.processes import kdcache


@pytest.mark.parametrize("options", [{"precision": "float32"}, {"precision": "6"}, {"select": "ipps", "k": 6}])
def test_an_honest_cache_agrees(teacher: Path, corpus: Path, tmp_path: Path, options: dict[str, object]) -> None:
    dump(dump_options(teacher, corpus, tmp_path / "c", **options))
    found = check_faithfulness(tmp_path / "c", str(teacher), rows=5)
    assert found["agrees"] and found["rows"] == 5
    exact = options.get("precision") == "float32"
    assert found["stored"]["total_variation"]["mean"] < (1e-5 if exact else 0.02)
    assert found["control"]["total_variation"]["worst"] == 0  # the CPU does the same twice


def shifted(cache: Path, out: Path) -> None:
    """The same cache with every target one position late, sealed as if it were right."""
    source, storage = open_cache(cache), LocalStorage(out)
    files = {p.name: p.read_bytes() for p in source.tokenizer_path.iterdir()}
    manifest = publish_manifest(storage, source.manifest, files)
    for shard, commit in source.commits.items():
        with new_shard(storage, manifest, shard) as writer:
            for row in range(commit.rows):
                packed, targets = source.shard(shard).read(row)
                writer.write(packed, targets[torch.arange(len(targets.count)).roll(1)])
            publish_shard(
                storage, manifest, writer, documents=commit.documents, entropies=commit.entropy_histogram,
                compute={},
            )  # fmt: skip


def test_a_shift_by_one_is_found(cache: Path, teacher: Path, tmp_path: Path) -> None:
    shifted(cache, tmp_path / "c")
    assert verify_cache(tmp_path / "c").ok
    done = kdcache("verify", tmp_path / "c", "--teacher", teacher, "--rows", "4", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["ok"]
    assert report["problems"][0]["what"].startswith("its targets are not those of this teacher")
    assert report["faithfulness"]["stored"]["total_variation"]["mean"] > 0.1  # of a random, rather flat teacher


def test_another_teacher_is_refused(cache: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "t", scale=4.0)
    make_tokenizer(tmp_path / "t")
    with pytest.raises(ModelError, match="is not the one that made"):
        check_faithfulness(cache, str(tmp_path / "t"))


def test_total_variation_of_known_targets(cache: Path) -> None:
    targets = open_cache(cache).read_packed(0)[1][:2]
    same = differences(targets, targets, 320)
    assert same["total_variation"].tolist() == [0, 0] and same["entropy"].tolist() == [0, 0]
    kept = targets.weights.sum(-1)
    moved = targets._map(torch.clone)
    moved.ids.copy_((targets.ids + 160) % 320)
    apart = differences(targets, moved, 320)["total_variation"]
    overlap = torch.isin(moved.ids[0], targets.ids[0])
    if not overlap.any():
        assert apart[0] == pytest.approx(float(kept[0]), abs=1e-6)
