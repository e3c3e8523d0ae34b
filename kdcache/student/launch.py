"""A training run in this process, or by ranks that Ray Train starts on a cluster.

Guarantee: a rank is the same `train` that torchrun would run, in the same process group, so the run is the same run:
its folder may be resumed by either. A rank that dies (its process, its node) ends the others, and all begin again from
the newest complete checkpoint, three times at most.
Cost: above that of torchrun, the start of the actors. One small actor beside the driver, the board, carries progress,
refusals and the summary to it; neither of them loads torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import errors
from kdcache.errors import KdcacheError, LaunchError
from kdcache.plugins import load_inherited
from kdcache.ray_cluster import connected, handed_on, has_gpus
from kdcache.student.config import TrainOptions

if TYPE_CHECKING:
    from kdcache.student.train import Progress

FAILURES = 3
"""How often the ranks are started again after one of them died."""

_TICK = 0.5
"""Seconds between looks at the board."""

Reading = Callable[[int, int], None]
"""Called with rows read and rows to read, while `where` reads the caches."""

Advice = Callable[[Sequence[str]], None]
"""Called before the first step with what usually goes wrong with such a run."""


def launch(
    options: TrainOptions,
    on_progress: Progress | None = None,
    on_reading: Reading | None = None,
    on_advice: Advice | None = None,
) -> dict[str, Any]:
    """Train in this process, or by the ranks that the options ask for.

    Returns:
        The summary that `kdcache train-student --json` prints.

    Raises:
        KdcacheError: see the exception tree; `LaunchError` if ranks died again and again.
    """
    if options.launch is None:
        from kdcache.student.train import train

        return train(options.config, on_progress, on_reading, on_advice)
    cpus, gpus = options.cpus_per_worker or 1, options.gpus_per_worker or 0.0
    with connected(options.address, cpus, gpus) as ray:
        if options.gpus_per_worker is None and options.device != "cpu" and has_gpus(ray):
            gpus = 1.0
        ranks = options.workers or (max(1, int(ray.cluster_resources()["GPU"] // gpus)) if gpus else 1)
        told = {"progress": on_progress, "reading": on_reading, "advice": on_advice}
        return _fit(ray, options, ranks, cpus, gpus, told)


def _fit(
    ray: Any,
    options: TrainOptions,
    ranks: int,
    cpus: float,
    gpus: float,
    told: Mapping[str, Callable[..., None] | None],
) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
    with _scratch(Path(options.out)) as scratch:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"config": options.config, "board": board, "folder": str(Path.cwd())},
            scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpus > 0, resources_per_worker=resources),
            run_config=RunConfig(
                name="ray", storage_path=str(scratch), failure_config=FailureConfig(max_failures=FAILURES),
                worker_runtime_env=handed_on(),
            ),
        )  # fmt: skip
        try:
            with _watched(ray, board, told):
                trainer.fit()
        except TrainingFailedError as error:
            refused = ray.get(board.refusal.remote())
            if refused is None:
                raise _failed(error) from error
    refused = ray.get(board.refusal.remote())
    if refused is not None:
        raise errors.rebuilt(*refused)
    summary: dict[str, Any] = ray.get(board.summary.remote())
    return summary


def _rank(settings: dict[str, Any]) -> None:
    """Be one rank."""
    import ray

    from kdcache.student.train import train

    with contextlib.suppress(OSError):  # a node that has no such folder
        os.chdir(settings["folder"])
    load_inherited()
    config, board, rank = settings["config"], settings["board"], int(os.environ["RANK"])
    attempt = ray.get(board.begin.remote(rank))
    if ray.get(board.refusal.remote()) is not None:  # the ranks were started again, because one of them refused
        return
    if attempt:
        config = dataclasses.replace(config, resume=True)
    try:
        summary = train(
            config,
            (lambda *figures: board.show.remote("progress", figures)) if rank == 0 else None,
            (lambda *figures: board.show.remote("reading", figures)) if rank == 0 else None,
            (lambda advice: board.show.remote("advice", (advice,))) if rank == 0 else None,
        )
    except KdcacheError as error:
        ray.get(board.refuse.remote(type(error).__name__, str(error)))
        raise
    if rank == 0:
        ray.get(board.end.remote(summary))


class _Board:
    """What the ranks tell the driver."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._shown: dict[str, tuple[Any, ...]] = {}
        self._refused: tuple[str, str] | None = None
        self._summary: dict[str, Any] | None = None

    def begin(self, rank: int) -> int:
        """How often a rank has begun before."""
        self._begun[rank] += 1
        return self._begun[rank] - 1

    def show(self, what: str, figures: tuple[Any, ...]) -> None:
        """Progress, the latest of each kind."""
        self._shown[what] = figures

    def refuse(self, name: str, message: str) -> None:
        """The error of a rank, the first of which counts."""
        self._refused = self._refused or (name, message)

    def end(self, summary: dict[str, Any]) -> None:
        """The summary of the run."""
        self._summary = summary

    def shown(self) -> dict[str, tuple[Any, ...]]:
        """What was shown since this was last asked."""
        shown, self._shown = self._shown, {}
        return shown

    def refusal(self) -> tuple[str, str] | None:
        """Name and sentence of the error of a rank."""
        return self._refused

    def summary(self) -> dict[str, Any] | None:
        """The summary of the run, if it has ended."""
        return self._summary


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for Ray Train's own files, which all nodes see as they see `out`; removed at the end."""
    new, scratch = not out.exists(), out.absolute() / ".ray"
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # something was written there
                out.rmdir()


@contextlib.contextmanager
def _watched(ray: Any, board: Any, to: Mapping[str, Callable[..., None] | None]) -> Iterator[None]:
    """Hand on what the board shows, from a thread."""
    ended = threading.Event()

    def watch() -> None:
        asked = board.shown.remote()
        while not ended.wait(_TICK):
            if not ray.wait([asked], timeout=0)[0]:  # the board is not there yet
                continue
            for what, figures in ray.get(asked).items():
                told = to[what]
                if told is not None:
                    told(*figures)
            asked = board.shown.remote()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _failed(error: Any) -> Exception:
    """What to raise for a training that Ray Train gave up."""
    from ray.exceptions import RayError, RayTaskError

    failures = list(getattr(error, "worker_failures", {}).values())
    if failures and all(isinstance(e, RayError) and not isinstance(e, RayTaskError) for e in failures):
        return LaunchError(
            f"ranks died {FAILURES + 1} times, one of them each time; the last: {errors.one_line(failures[0])}"
        )
    return RuntimeError(f"a rank failed {FAILURES + 1} times: {error}")
