"""Dumps and training on a real Ray cluster of two nodes on this machine, some of whose processes are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdcache.cache import open_cache
from kdcache.verify import verify_cache
from tests.making import STUDENT, TEXTS, make_model, make_tokenizer
from tests.processes import PATIENCE, kdcache, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'kdcache[ray]'")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Command(subprocess.Popen[str]):
    """A real command in a new interpreter."""

    def __init__(self, *arguments: object, cwd: Path | None = None, env: dict[str, str] = ENVIRONMENT) -> None:
        words = [sys.executable, "-m", "kdcache_cli", *map(str, arguments)]
        super().__init__(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)

    def end(self) -> tuple[int, str, str]:
        out, err = self.communicate(timeout=PATIENCE)
        return self.returncode, out, err


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one core; tests add nodes."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # beside other work, a nice process would not get on
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield found
        finally:
            found.shutdown()


HOLDING = '''
"""The transformers engine, which begins no shard from the sixth on while there is a file "hold" in the folder."""

import time
from pathlib import Path
from kdcache import register_engine
from kdcache.teacher.engines.transformers import TransformersEngine

@register_engine
class Holding(TransformersEngine):
    name = "holding"

    def run(self, batch, request):
        while batch.keys[0, 0] >= 5 and Path("hold").exists():
            time.sleep(0.02)
        return super().run(batch, request)
'''


@pytest.fixture
def hold(work: Path) -> Iterator[Path]:
    """While this file is there, nobody gets further than the fifth shard."""
    path = work / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a corpus of 29 shards, and the cache that one process makes of them."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "holding_engine.py").write_text(HOLDING)
    (folder / "teacher").mkdir()
    make_tokenizer(folder / "teacher")
    make_model(folder / "teacher", max_position_embeddings=512)
    texts = [{"text": f"{n}: {text}"} for n in range(8) for text in TEXTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    done = kdcache(*dumping("one"), cwd=folder, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder


def dumping(out: object, *more: object, corpus: str = "corpus.jsonl") -> list[object]:
    """Arguments, with relative names: workers find them, too."""
    return [
        "dump-teacher", "--teacher", "teacher", "--corpus", corpus, "--out", out, "--seq-len", 512, "--k", 64,
        "--temperatures", "1,2", "--docs-per-shard", 30, "--device", "cpu", "--plugin", "holding_engine.py",
        "--engine", "holding", "--json", *more,
    ]  # fmt: skip


def on_ray(cluster: Any, out: object, *more: object, workers: int = 2, **options: Any) -> list[object]:
    return dumping(out, "--launch", "ray", "--address", cluster.address, "--workers", workers, *more, **options)


def committed(cache: Path) -> int:
    return len(list((cache / "commits").glob("*.json")))


def children(node: Any) -> list[psutil.Process]:
    """The processes of workers on a node."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid).children()


def title(process: psutil.Process) -> str:
    """What Ray has named a process, such as ray::Actor.do."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""


def actors(node: Any) -> list[psutil.Process]:
    """The processes of our actors on a node."""
    return [child for child in children(node) if "Actor" in title(child)]


def works_on(node: Any) -> Callable[[], bool]:
    return lambda: any(".do" in title(actor) for actor in actors(node))


def require_the_cache_of_one(work: Path, cache: Path) -> None:
    """Verified, and every file is the same, to the byte."""
    found = subprocess.run(["diff", "-r", work / "one", cache], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert verify_cache(cache).ok


def test_a_node_that_is_killed_in_the_middle_of_a_dump_and_replaced(cluster: Any, work: Path, hold: Path) -> None:
    cache, second = work / "nodes", cluster.add_node(num_cpus=1)
    driver = Command(*on_ray(cluster, "nodes"), cwd=work)
    wait_until(lambda: works_on(second)() and committed(cache) > 1, driver, "nothing works on the second node")
    cluster.remove_node(second, allow_graceful=False)
    third = cluster.add_node(num_cpus=1)
    try:
        wait_until(works_on(third), driver, "nothing works on the new node")
        hold.unlink()
        code, out, err = driver.end()
        assert (code, err) == (0, "")
        summary = json.loads(out)
        assert summary["complete"] and summary["replaced"] == 1 and summary["workers"] == 2
        require_the_cache_of_one(work, cache)
    finally:
        driver.kill()
        cluster.remove_node(third)


@pytest.mark.long
def test_a_node_that_is_not_replaced_leaves_its_work_to_the_others(cluster: Any, work: Path, hold: Path) -> None:
    cache, second = work / "left", cluster.add_node(num_cpus=1)
    driver = Command(*on_ray(cluster, "left"), cwd=work)
    wait_until(lambda: works_on(second)() and committed(cache) > 1, driver, "nothing works on the second node")
    cluster.remove_node(second, allow_graceful=False)
    hold.unlink()
    code, _, err = driver.end()
    assert (code, err) == (0, "")
    require_the_cache_of_one(work, cache)


@pytest.mark.long
def test_a_killed_actor_is_replaced(cluster: Any, work: Path, hold: Path) -> None:
    cache = work / "killed"
    driver = Command(*on_ray(cluster, "killed", workers=1), cwd=work)
    wait_until(lambda: committed(cache) > 1 and works_on(cluster.head_node)(), driver, "no shard is committed")
    actors(cluster.head_node)[0].kill()
    hold.unlink()
    code, out, err = driver.end()
    assert (code, err) == (0, "")
    assert json.loads(out)["replaced"] == 1
    require_the_cache_of_one(work, cache)


def test_a_stopped_driver_ends_its_actors_and_is_resumed(cluster: Any, work: Path, hold: Path) -> None:
    cache = work / "stopped"
    driver = Command(*on_ray(cluster, "stopped", workers=1), cwd=work)
    wait_until(lambda: committed(cache) == 5, driver, "no shard is committed")
    driver.send_signal(signal.SIGTERM)
    assert driver.end() == (75, "", "stopped; what is finished is kept\n")
    end = time.monotonic() + PATIENCE
    while actors(cluster.head_node):
        assert time.monotonic() < end, "the actor does not end"
        time.sleep(0.05)
    assert committed(cache) == 5 and len(open_cache(cache, partial=True)) > 0
    hold.unlink()
    code, out, err = Command(*on_ray(cluster, "stopped", workers=1), cwd=work).end()
    assert (code, err) == (0, "")
    assert json.loads(out)["shards"]["by_this_worker"] == committed(work / "one") - 5
    require_the_cache_of_one(work, cache)


BROKEN = """
from kdcache import register_engine
from kdcache.teacher.engines.transformers import TransformersEngine

@register_engine
class Broken(TransformersEngine):
    name = "broken"

    def run(self, batch, request):
        if batch.keys[:1, 0].tolist() == [3]:
            raise RuntimeError("a shard that nobody can make")
        return super().run(batch, request)
"""


@pytest.mark.long
def test_a_shard_that_fails_again_and_again_is_named_with_its_traceback(cluster: Any, work: Path) -> None:
    (work / "broken_engine.py").write_text(BROKEN)
    plugin = ("--plugin", "broken_engine.py", "--engine", "broken")
    code, out, err = Command(*on_ray(cluster, "broken", *plugin, workers=1), cwd=work).end()
    assert code == 1 and out == ""
    assert "shard 3 ended 3 workers" in err and "RuntimeError: a shard that nobody can make" in err


def test_bad_input_that_a_worker_finds_is_one_sentence(cluster: Any, work: Path) -> None:
    (work / "bad.jsonl").write_text('{"text": "fine"}\nnot JSON at all\n')
    code, out, err = Command(*on_ray(cluster, "b", corpus="nowhere.jsonl", workers=1), cwd=work).end()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and "nowhere.jsonl" in err and err.count("\n") == 1
    code, out, err = Command(*on_ray(cluster, "b", "--on-bad-record", "stop", corpus="bad.jsonl"), cwd=work).end()
    assert code == 2 and err.count("\n") == 1 and "document 1" in err
    assert not (work / "b" / "kdcache.json").exists()


HELD_WRITER = '''
"""A writer that begins no file from the sixth on while there is a file "hold" in the folder."""

import os
import time
from pathlib import Path
from kdcache.generation.writer import Writer

write = Writer.write

def held(self, prompts, *more):
    while prompts[0].document >= 40 and Path("hold").exists():
        Path(f"held-{os.getpid()}").touch()
        time.sleep(0.02)
    return write(self, prompts, *more)

Writer.write = held
'''


def writing(out: object, *more: object) -> list[object]:
    return [
        "generate", "--writer", "teacher", "--prompts", "prompts.jsonl", "--out", out, "--max-new-tokens", 40,
        "--docs-per-shard", 8, "--batch-rows", 8, "--device", "cpu", "--plugin", "held_writer.py", "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(work: Path) -> Path:
    """A corpus of 14 files that one process writes."""
    (work / "held_writer.py").write_text(HELD_WRITER)
    (work / "prompts.jsonl").write_text("".join(json.dumps({"text": text[:40]}) + "\n" for text in TEXTS))
    done = kdcache(*writing("written"), cwd=work, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return work / "written"


def test_a_node_that_is_killed_while_a_corpus_is_written(cluster: Any, written: Path, work: Path, hold: Path) -> None:
    out, second = work / "by-nodes", cluster.add_node(num_cpus=1)
    on = ("--launch", "ray", "--address", cluster.address, "--workers", 2)
    driver = Command(*writing(out, *on), cwd=work)
    holds = lambda: any((work / f"held-{actor.pid}").exists() for actor in actors(second))  # noqa: E731
    wait_until(holds, driver, "nothing is written on the second node")
    cluster.remove_node(second, allow_graceful=False)
    hold.unlink()
    code, said, err = driver.end()
    assert (code, err) == (0, "")
    summary = json.loads(said)
    assert summary["complete"] and summary["shards"]["by_this_worker"] == 14 and summary["replaced"] == 1
    found = subprocess.run(["diff", "-r", written, out], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_an_address_where_nobody_is(work: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def chat() -> None:  # as a server of HTTP/1 would
            with contextlib.suppress(OSError):  # until the port is closed
                while True:
                    with other.accept()[0] as connection:
                        connection.recv(64)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=chat, daemon=True).start()
        for scheme in ("", "ray://"):
            refused(work, f"{scheme}127.0.0.1:{port}", f"what answers at {scheme}127.0.0.1:{port} is no Ray cluster")
        other.shutdown(socket.SHUT_RDWR)  # or the thread that waits would answer once more
    for scheme in ("", "ray://"):
        address = f"{scheme}127.0.0.1:{port}"
        refused(work, address, f"no Ray cluster answers at {address}: [Errno 111] Connection refused")
    refused(work, "rubbish", "--address is rubbish, but must be auto, HOST:PORT or ray://HOST:PORT")
    assert not (work / "n").exists()


def refused(work: Path, address: str, said: str) -> None:
    code, out, err = Command(*dumping("n", "--launch", "ray", "--address", address), cwd=work).end()
    assert (code, out, err) == (2, "", f"error: {said}\n")


def training(work: Path, out: str, *more: object) -> list[object]:
    return [
        "train-student", "--cache", "one", "--student", "student.json", "--out", out, "--steps", 8, "--batch-rows", 2,
        "--lr", "5e-3", "--heldout", "0.1", "--temperature", 2, "--soft-weight", 0.7, "--device", "cpu",
        "--dtype", "float32", "--save-every", 2, "--json", *more,
    ]  # fmt: skip


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("data_wait_share", None)  # a time
    return lines


@pytest.fixture(scope="module")
def by_torchrun(work: Path) -> Path:
    """What two ranks of torchrun make."""
    student = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **STUDENT, "max_position_embeddings": 512}
    (work / "student.json").write_text(json.dumps(student))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kdcache_cli"]
    command = [sys.executable, *words, *map(str, training(work, "torchrun"))]
    done = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work / "torchrun"


def ranks(cluster: Any) -> list[psutil.Process]:
    """The processes of the ranks that Ray Train has started on the nodes of the cluster."""
    return [child for node in cluster.list_all_nodes() for child in children(node) if "TrainWorker" in title(child)]


def require_the_run_of_torchrun(by_torchrun: Path, out: Path) -> None:
    assert curve(out) == curve(by_torchrun)
    assert (out / "model.safetensors").read_bytes() == (by_torchrun / "model.safetensors").read_bytes()
    assert not (out / ".ray").exists()


def test_ray_train_makes_the_loss_curve_of_torchrun(cluster: Any, work: Path, by_torchrun: Path) -> None:
    second = cluster.add_node(num_cpus=1)
    try:
        on = ("--launch", "ray", "--address", cluster.address, "--workers", 2)
        code, out, err = Command(*training(work, "trained", *on), cwd=work).end()
        assert (code, err) == (0, "")
        assert json.loads(out)["steps"] == 8
        require_the_run_of_torchrun(by_torchrun, work / "trained")
        code, out, err = Command(*training(work, "trained", *on), cwd=work).end()
        assert (code, out) == (2, "") and "--resume" in err and err.count("\n") == 1, err

        driver = Command(*training(work, "killed-rank", *on), cwd=work)
        wait_until(lambda: any((work / "killed-rank").glob("checkpoint-*")), driver, "there is no checkpoint")
        ranks(cluster)[0].kill()
        code, out, err = driver.end()
        assert (code, err) == (0, "")
        require_the_run_of_torchrun(by_torchrun, work / "killed-rank")
    finally:
        cluster.remove_node(second)
