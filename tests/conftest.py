"""Fixtures: a tiny teacher made on the spot, a corpus for it, a cache, and the shared assets."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: tests start processes beside themselves
if "PYTEST_XDIST_WORKER" in os.environ:  # others have the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is loaded: kernels of a GPU run here, on the CPU

from tests.making import STUDENT, TEXTS, dump_options, make_model, make_tokenizer
from tests.objects import ENVIRONMENT, Bucket, Endpoint
from tests.processes import READY

pytest.register_assert_rewrite("kdcache.testing.store_conformance")  # an inherited suite explains itself as any other


def pytest_collection_finish() -> None:
    """What is there for good is not looked through again: accelerate collects garbage in every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def assets() -> Path:
    folder = os.environ.get("KDCACHE_ASSETS")
    if not folder:
        pytest.skip("KDCACHE_ASSETS does not name the folder of real models and texts")
    return Path(folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 384 padded ids over a tokenizer of 320."""
    folder = tmp_path_factory.mktemp("teacher")
    make_tokenizer(folder)
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="session")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **STUDENT}))
    return path


@pytest.fixture(scope="session")
def cache(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of four shards. Tests that change it work on a copy."""
    from kdcache.teacher.dump import dump

    out = tmp_path_factory.mktemp("cache") / "c"
    assert dump(dump_options(teacher, corpus, out))["complete"]
    return out


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real S3 endpoint, for this process and those that it starts."""
    server = Endpoint(tmp_path_factory.mktemp("endpoint") / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture(scope="session")
def sure_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but sharper: its entropies are spread over 0.2 to 3 nats, the median at 1.3."""
    folder = tmp_path_factory.mktemp("sure")
    make_tokenizer(folder)
    make_model(folder, scale=48)
    return folder


@pytest.fixture(scope="session")
def chosen_cache(sure_teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache with targets at about a sixth of the labels."""
    from kdcache.teacher.dump import dump

    out = tmp_path_factory.mktemp("chosen") / "c"
    assert dump(dump_options(sure_teacher, corpus, out, positions="entropy>2"))["complete"]
    return out


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, 98 MB, kept in the user's cache folder once it is fetched."""
    from kdcache.demo.smollm2 import fetch_smollm2
    from kdcache.errors import KdcacheError

    try:
        return fetch_smollm2()
    except KdcacheError as error:
        pytest.skip(str(error))


@pytest.fixture
def ready_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--readers` are processes that have imported everything, and share as little with this one as usual."""
    monkeypatch.setattr("kdcache.student.data_workers.START", READY)


@pytest.fixture
def bucket(endpoint: Endpoint, request: pytest.FixtureRequest) -> Bucket:
    import s3fs

    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    return Bucket(s3fs.S3FileSystem(use_listings_cache=False), f"s3://bucket-{name}")
