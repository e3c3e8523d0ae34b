"""Three hundred flipped bits, one at a time, over every object of a cache: each is named, none is believed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import KdcacheError, Row, open_cache, verify_cache
from kdcache.teacher.dump import dump
from tests.making import dump_options


def same(one: Row, two: Row) -> bool:
    fields = [f.name for f in dataclasses.fields(one.targets)]
    pairs = [(getattr(one.targets, n), getattr(two.targets, n)) for n in fields]
    pairs += [(getattr(one, n), getattr(two, n)) for n in ("tokens", "labels", "segments", "documents")]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "6"])
def test_300_flips(teacher: Path, corpus: Path, tmp_path: Path, precision: str) -> None:
    whole = tmp_path / "whole"
    dump(dump_options(teacher, corpus, whole, precision=precision))
    rows = list(open_cache(whole))
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    random = np.random.default_rng(0)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    refused = 0
    for flip in range(300):
        name = names[flip % len(names)]
        data = bytearray((whole / name).read_bytes())
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        (broken / name).write_bytes(data)
        problems = verify_cache(broken).problems
        assert name in {p["object"] for p in problems}, (flip, name, problems)
        try:
            cache = open_cache(broken)
        except KdcacheError:
            refused += 1
        else:
            for index, row in enumerate(rows):
                try:
                    again = cache[index]
                except KdcacheError:
                    refused += 1
                else:
                    assert same(again, row), (flip, name, index)
        (broken / name).write_bytes((whole / name).read_bytes())
    assert refused > 150
    assert verify_cache(broken).ok
