"""Workers that are processes of this machine, each with its share of the cores and GPUs.

The driver writes a task a line to a worker's standard input, and reads its answers, a line each, from its standard
output; what a library prints there goes to standard error. A worker whose driver is gone ends after its shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from kdcache import stopping
from kdcache.crew.assign import Answer
from kdcache.crew.tasks import Outcome, Task, TaskWorker
from kdcache.errors import ConfigError
from kdcache.launcher import LaunchOptions
from kdcache.worker import available_cores

_FAREWELL = 20.0
"""Seconds that a worker has to end after it was told to."""

_TICK = 0.5
"""Seconds between two lines of progress."""


@contextlib.contextmanager
def local_workers(module: str, config: Any, options: LaunchOptions, device: str) -> Iterator[Processes]:
    """Processes of this machine, which all end with the context.

    Args:
        module: what each runs, `python -m module`; it calls `serve` with its `make_worker`.
        config: a dataclass, whose fields each worker is given.
        options: how many workers, and what each may use.
        device: that the workers run on; on `cpu` they get no GPUs.

    Raises:
        ConfigError: more GPUs for a worker than there are.
    """
    gpus = [] if device == "cpu" else visible_gpus(os.environ)
    each = options.gpus_per_worker if options.gpus_per_worker is not None else float(bool(gpus))
    if each > len(gpus):
        raise ConfigError(f"gpus_per_worker is {each:g}, but this machine has {len(gpus)} GPUs")
    count = options.workers or (max(1, int(len(gpus) // each)) if each else 1)
    cores = options.cpus_per_worker or max(1, available_cores() // count)
    environments = [_environment(cores, _share(gpus, each, worker)) for worker in range(count)]
    processes = Processes(module, dataclasses.asdict(config), environments)
    try:
        yield processes
    finally:
        processes.stop()


def visible_gpus(environment: os._Environ[str] | dict[str, str]) -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _share(gpus: Sequence[str], each: float, worker: int) -> list[str]:
    """The GPUs of a worker: the next so many, in rounds; a share of one GPU is one that others have, too."""
    wanted = max(1, int(each)) if each else 0
    groups = len(gpus) // wanted if wanted else 0
    first = worker % groups * wanted if groups else 0
    return list(gpus[first : first + wanted])


def _environment(cores: int, gpus: Sequence[str]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(cores), **os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


class Processes:
    """A `Crew` of processes.

    Args:
        module: what each runs.
        fields: of the configuration, which each is given.
        environments: of each worker.
    """

    def __init__(self, module: str, fields: dict[str, Any], environments: Sequence[dict[str, str]]) -> None:
        self.count = len(environments)
        self._module, self._fields, self._environments = module, fields, environments
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ready = selectors.DefaultSelector()
        self._read: dict[int, bytes] = {}  # of a line that has not ended yet

    def start(self, worker: int) -> None:
        """See `Crew`."""
        self._end([worker])
        process = subprocess.Popen(
            [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=self._environments[worker], start_new_session=True,
        )  # fmt: skip
        self._processes[worker], self._read[worker] = process, b""
        self._ready.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        self._write(worker, self._fields)

    def ask(self, worker: int, task: Task) -> None:
        """See `Crew`."""
        self._write(worker, dataclasses.asdict(task))

    def answers(self, seconds: float) -> Iterator[Answer]:
        """See `Crew`."""
        for key, _ in self._ready.select(seconds):
            worker = key.data
            said = os.read(key.fd, 1 << 16)
            if not said:
                self._ready.unregister(key.fileobj)
                code = self._processes[worker].wait()
                yield Answer(
                    worker, died=f"ended with exit code {code}" if code >= 0 else f"was ended by {_name(-code)}"
                )
                continue
            *lines, self._read[worker] = (self._read[worker] + said).split(b"\n")
            for line in lines:
                yield _answer(worker, json.loads(line))

    def stop(self) -> None:
        """End all processes; those that have nothing to do close their models first."""
        self._end(list(self._processes))

    def _write(self, worker: int, value: dict[str, Any]) -> None:
        stream = self._processes[worker].stdin
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which its output tells
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()

    def _end(self, workers: Sequence[int]) -> None:
        processes = [self._processes.pop(worker) for worker in workers if worker in self._processes]
        for process in processes:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(KeyError):
                self._ready.unregister(process.stdout)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.terminate()  # of those that are at work, with whole shards
        for process in processes:
            try:
                process.wait(_FAREWELL)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _answer(worker: int, said: dict[str, Any]) -> Answer:
    if "progress" in said:
        return Answer(worker, progress=tuple(said["progress"]))
    return Answer(worker, outcome=Outcome(**said))


def serve(make_worker: Callable[[dict[str, Any]], TaskWorker]) -> None:
    """Be a worker: do the tasks of standard input, in order, until it ends.

    Args:
        make_worker: makes it of the fields of its configuration; of a list there is a tuple.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ending = False

    def end(*_: Any) -> None:
        if not ending:
            sys.exit(128 + signal.SIGTERM)

    # The handler stays: Python complains of a signal that comes while its handler is changed.
    signal.signal(signal.SIGTERM, stopping.outside_imports(end))
    fields: dict[str, Any] = json.loads(sys.stdin.readline())
    worker = make_worker({name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    try:
        for line in sys.stdin:
            with _telling(worker, answers):
                outcome = worker.do(Task(**json.loads(line)))
            _say(answers, dataclasses.asdict(outcome))
    finally:
        ending = True
        worker.close()


def _say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


@contextlib.contextmanager
def _telling(worker: TaskWorker, answers: TextIO) -> Iterator[None]:
    """Tell the driver of a worker's progress, from a thread of its own, while it works."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_TICK):
            _say(answers, {"progress": worker.progress})

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
