"""Fixtures: a small honest cache in each store, to be forged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.making import dump_options

STORES = ("arrow", "zarr", "arrow frames")
CHOSEN = ("arrow chosen", "zarr chosen")


@pytest.fixture(scope="session")
def honest(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Complete caches of two shards of six documents; in those of CHOSEN about half of the labels carry a target."""
    from kdcache.teacher.dump import dump

    folder = tmp_path_factory.mktemp("honest")
    for name in (*STORES, *CHOSEN):
        options = dump_options(
            teacher, corpus, folder / name, store=name.split()[0], limit_docs=12, docs_per_shard=6,
            precision="6" if name == "arrow frames" else "float32",
            positions="entropy>5.37" if name in CHOSEN else "all",
        )  # fmt: skip
        dump(options)
    return {name: folder / name for name in (*STORES, *CHOSEN)}
