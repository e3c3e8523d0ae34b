"""Fixtures: a small honest cache in each store, to be forged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.making import dump_options

STORES = ("arrow", "zarr")


@pytest.fixture(scope="session")
def honest(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete cache of two shards of six documents, by store."""
    from kdcache.teacher.dump import dump

    folder = tmp_path_factory.mktemp("honest")
    for store in STORES:
        dump(
            dump_options(
                teacher, corpus, folder / store, store=store, limit_docs=12, docs_per_shard=6, precision="float32"
            )
        )
    return {store: folder / store for store in STORES}
