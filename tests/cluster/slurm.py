"""A real SLURM for tests: a controller and three nodes of two GPUs each, all of them on this machine, below one folder.

Jobs of the partition `urgent` preempt those of `main`, with a grace time; a job that is requeued waits for six seconds.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import PATIENCE

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2", "n3")


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def until(true: Callable[[], object], what: str | Callable[[], str], seconds: float = PATIENCE) -> None:
    """Wait until something is true; fail with a sentence if that takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)


class Slurm:
    """A running cluster.

    Attributes:
        environment: in which SLURM's commands find it.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, *command: object, folder: Path | None = None, **names: object) -> str:
        """What a command says, in a folder, which must succeed; `names` are added to its environment."""
        environment = {**self.environment, **{name: str(value) for name, value in names.items()}}
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: object, **names: object) -> str:
        """Submit a batch file with `sbatch`; the job's number."""
        return self.run("sbatch", "--parsable", *words, **names)

    def state(self, job: str) -> str:
        """The states of a job, of a task `JOB_TASK`, or of all tasks of an array that are in the queue; a word each."""
        return " ".join(self.run("squeue", "-h", "-t", "all", "-r", "-o", "%T", "-j", job).split())

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_running(self, job: str) -> None:
        """Wait until a job runs."""
        until(lambda: self.state(job) == "RUNNING", f"job {job} does not run")

    def wait(self) -> None:
        """Wait until all jobs have ended."""
        until(lambda: not self.run("squeue", "-h"), lambda: f"the jobs do not end: {self.run('squeue')}")


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """A cluster that lives while the block does. The name of its folder must be short: a socket lies in it."""
    folder.chmod(0o755)
    _configure(folder)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    munged = ["munged", "-F", "-f", f"--socket={folder}/munge", f"--key-file={folder}/key"]
    munged += [f"--{what}-file={folder}/munged.{what}" for what in ("pid", "log", "seed")]
    slurm, daemons = Slurm(environment), []
    with (folder / "log").open("w") as log:
        for command in (munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(0.5)
        try:
            idle = ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"]
            states = lambda: subprocess.run(idle, env=environment, capture_output=True, text=True, check=False).stdout  # noqa: E731
            until(lambda: states().split() == ["idle"] * len(NODES), lambda: (folder / "log").read_text(), 300)
            yield slurm
        finally:
            subprocess.run(["scancel", "-f", "-u", getpass.getuser()], env=environment, check=False)
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(60)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _configure(folder: Path) -> None:
    """The files of a cluster that runs as whoever runs the tests."""
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    controller, *ports = _free_ports(1 + len(NODES))
    options = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": controller,
        "SlurmUser": user, "SlurmdUser": user, "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge,cred_expire=5",  # for which a requeued job waits
        "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool.%n",
        "SlurmctldPidFile": f"{folder}/controller.pid", "SlurmdPidFile": f"{folder}/node.%n.pid",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none",
        "SelectType": "select/cons_tres", "GresTypes": "gpu", "SlurmdParameters": "config_overrides",
        "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
        "MinJobAge": 86400,  # what has ended can still be asked about
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in options.items()]
    for node, port in zip(NODES, ports, strict=True):
        where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
        lines.append(f"NodeName={node} {where} CPUs=16 RealMemory=1000 Gres=gpu:2")
    lines.append("PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=300")
    lines.append("PartitionName=urgent Nodes=ALL PriorityTier=10")
    (folder / "slurm.conf").write_text("\n".join([*lines, ""]))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
