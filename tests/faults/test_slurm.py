"""The example's batch file under a real SLURM: one machine that says it has four GPUs."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.making import TEXTS, make_model, make_tokenizer
from tests.processes import PATIENCE, kdcache

BATCH = Path(__file__).parents[2] / "examples" / "slurm" / "dump.sbatch"
SHARDS = ("--docs-per-shard", "100")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name, path=PATH) is None for name in ("munged", "slurmctld", "slurmd", "sbatch")),
        reason="SLURM is not installed (slurmctld, slurmd, munge): tests/faults/install_slurm.sh",
    ),
]


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def configure(folder: Path) -> None:
    """The files of a controller and a node that live below one folder, as whoever runs the test."""
    host, user, ports = socket.gethostname().partition(".")[0], getpass.getuser(), free_ports(2)
    options = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": ports[0], "SlurmdPort": ports[1],
        "SlurmUser": user, "SlurmdUser": user, "AuthType": "auth/munge", "AuthInfo": f"socket={folder}/munge",
        "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/controller.pid", "SlurmdPidFile": f"{folder}/node.pid",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none",
        "SelectType": "select/cons_tres", "GresTypes": "gpu", "SlurmdParameters": "config_overrides",
    }  # fmt: skip
    node = f"NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000 Gres=gpu:4"
    lines = [f"{name}={value}" for name, value in options.items()]
    (folder / "slurm.conf").write_text("\n".join([*lines, node, f"PartitionName=main Nodes={host} Default=YES", ""]))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-3]\n")
    for name in ("gpu0", "gpu1", "gpu2", "gpu3"):
        (folder / name).touch()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find a running cluster."""
    with tempfile.TemporaryDirectory() as name:  # short: a socket lies in it
        folder = Path(name)
        folder.chmod(0o755)
        configure(folder)
        environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        munged = ["munged", "-F", "-f", f"--socket={folder}/munge", f"--key-file={folder}/key"]
        munged += [f"--{what}-file={folder}/munged.{what}" for what in ("pid", "log", "seed")]
        daemons = []
        with (folder / "log").open("w") as log:
            for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                time.sleep(0.5)
            try:
                until(lambda: said(environment, "sinfo", "-h", "-o", "%t") == "idle", (folder / "log").read_text(), 300)
                yield environment
            finally:
                subprocess.run(["scancel", "-f", "-u", getpass.getuser()], env=environment, check=False)
                for daemon in reversed(daemons):
                    daemon.send_signal(signal.SIGTERM)
                    daemon.wait(30)


def said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def submit(environment: dict[str, str], *options: str) -> str:
    """Submit the example; its job's number."""
    number = said(environment, "sbatch", "--parsable", "--cpus-per-task=2", *options, str(BATCH), *SHARDS)
    assert number.isdigit(), number
    return number


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of 1,024 positions, a corpus of several shards, and the cache that one process makes."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "teacher").mkdir()
    make_tokenizer(folder / "teacher")
    make_model(folder / "teacher", max_position_embeddings=1024)
    texts = [{"text": f"{n}: {text}"} for n in range(8) for text in TEXTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    options = ["--seq-len", "1024", "--k", "64", "--temperatures", "1,2", "--precision", "6"]
    teacher, corpus = ["--teacher", str(folder / "teacher")], ["--corpus", str(folder / "corpus.jsonl")]
    done = kdcache("dump-teacher", *teacher, *corpus, "--out", folder / "whole", *options, *SHARDS, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "whole" / "commits").iterdir())) > 4, "fewer shards than workers"
    return folder


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def for_job(cluster: dict[str, str], work: Path, name: str) -> dict[str, str]:
    names = {"TEACHER": work / "teacher", "CORPUS": work / "corpus.jsonl", "CACHE": work / name}
    return {**cluster, "SBATCH_OUTPUT": str(work / f"{name}-%A-%a.out"), **{k: str(v) for k, v in names.items()}}


def require_the_cache_of_one(work: Path, name: str) -> None:
    """Every file is the same, to the byte."""
    told = "".join(path.read_text() for path in sorted(work.glob(f"{name}-*.out")))
    found = subprocess.run(["diff", "-r", work / "whole", work / name], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + told


def test_an_array_of_tasks(cluster: dict[str, str], work: Path) -> None:
    environment = for_job(cluster, work, "array")
    submit(environment, "--array=0-2")
    until(lambda: not said(environment, "squeue", "-h"), "the jobs do not end")
    require_the_cache_of_one(work, "array")


def test_tasks_of_two_gpus_cancelled_and_submitted_again(cluster: dict[str, str], work: Path) -> None:
    environment = for_job(cluster, work, "nodes")
    first = submit(environment, "--array=0-1", "--gpus-per-node=2")
    until(lambda: any((work / "nodes" / "commits").glob("*.json")), "no shard is committed")
    said(environment, "scancel", first)
    until(lambda: not said(environment, "squeue", "-h"), "the jobs do not end")
    submit(environment, "--array=0-1", "--gpus-per-node=2")
    until(lambda: not said(environment, "squeue", "-h"), "the jobs do not end")
    require_the_cache_of_one(work, "nodes")
