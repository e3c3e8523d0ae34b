"""Processes that tests start.

A fresh interpreter takes three to eight seconds of processor time to import torch, transformers and numba. Most tests
need a process that is really another one (its own memory, streams and environment, really killed) and not the imports.
Those are forked off a server that has imported everything and run nothing (multiprocessing's forkserver, one for each
process of pytest), so that they share with the test no thread, lock or connection.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PATIENCE = 900.0
"""Seconds until a test takes a process for hung. Beside other work it takes many times as long as alone."""


class _Environment:
    """Variables that a process makes its own when it unpickles this; the server's are those of its start."""

    def __init__(self, wanted: Mapping[str, str] | None) -> None:
        self._wanted = wanted

    def __reduce__(self) -> tuple[Any, ...]:
        return _enter, (dict(os.environ if self._wanted is None else self._wanted),)


def _enter(variables: dict[str, str]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:  # read when torch was imported
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))


class _ReadyProcess(ForkServerProcess):
    def __init__(self, *args: Any, env: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self._environment = _Environment(env)  # the first attribute: before the arguments, which may look at it
        super().__init__(*args, **kwargs)


class _ReadyContext(ForkServerContext):
    Process = _ReadyProcess


READY = _ReadyContext()
"""A context of multiprocessing whose processes have imported what tests/ready.py imports."""
READY.set_forkserver_preload(["tests.ready"])


class ReadyMade:
    """`python arguments` in a process that has imported everything; to be used as a `subprocess.Popen` of text.

    Args:
        arguments: `-m module ...` or `-c code ...`, as after `python`.
        env: its environment; that of this process if not given.
        cwd: its working folder, likewise.
    """

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self._told = [Path(self._streams.name) / name for name in ("stdout", "stderr")]
        self._said: list[str] = []
        given = [str(argument) for argument in arguments]
        self._process = READY.Process(target=_become, args=(given, self._told, str(cwd or Path.cwd())), env=env)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("a process of a test", timeout)
        if not self._said:
            self._said = [path.read_text() if path.exists() else "" for path in self._told]
            self._streams.cleanup()
        return int(self._process.exitcode)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        return self._said[0], self._said[1]


def _become(arguments: list[str], streams: list[Path], folder: str) -> None:
    """Be `python arguments`, in a process that was just forked."""
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    how, what, *rest = arguments
    sys.argv = [how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Ranks:
    """`torchrun --nproc-per-node N arguments`, its ranks ready-made; `communicate` gives what all of them said.

    As under torchrun the store is not held by a rank, since one of them ends first, and if one fails the others are
    killed.
    """

    def __init__(self, ranks: int, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port,
            "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment = {**(env or os.environ), **{name: str(value) for name, value in shared.items()}}
        self.processes = [
            ReadyMade(*arguments, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]

    def poll(self) -> int | None:
        """None while all run or some run and none has failed."""
        codes = [process.poll() for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.poll() != 0:
            self.kill()
        said = [process.communicate() for process in self.processes]
        return "".join(out for out, _ in said), "".join(err for _, err in said)


def wait_until(true: Callable[[], bool], process: ReadyMade | Ranks, what: str, every: float = 0.02) -> None:
    """Wait for something that a process does while it runs; fail, with its words, if it ends or hangs before."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if process.poll() is not None and not true():
            raise AssertionError(f"the process ended, but {what}: {process.communicate()}")
        assert time.monotonic() < deadline, what
        time.sleep(every)


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python arguments` to its end in a process that is ready-made (see `ReadyMade`)."""
    process = ReadyMade(*arguments, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(list(map(str, arguments)), process.returncode or 0, out, err)


def kdcache(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own, which is ready-made."""
    return python("-m", "kdcache_cli", *arguments, **options)


def fresh_kdcache(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command in an interpreter that is started anew."""
    command = [sys.executable, "-m", "kdcache_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)
