"""What a run needs of the machine and its packages, checked before anything is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from kdcache.errors import ConfigError
from kdcache.student import distributed
from kdcache.student.config import TrainConfig

_PLACES = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "."}
"""Where the trackers of `log_to` write, inside the folder of the run: the variables that Trainer and wandb read."""


def require_environment(config: TrainConfig, device: torch.device) -> None:
    """Refuse a run that this process, on this device, cannot make as it was asked for.

    Raises:
        ConfigError: a package is missing, or there is nothing to shard over.
    """
    for name in config.trackers():
        _require_package(name, f"log_to {name}", name)
    if config.lora:
        _require_package("peft", f"lora {config.lora}", "kdcache[lora]")
        if Path(config.start).suffix == ".json":
            raise ConfigError(
                f"lora {config.lora} needs weights that were trained, but the student {config.start} has none: "
                "give a checkpoint, or train all weights without adapters"
            )
    if config.init_from is not None and distributed.world() > 1:
        raise ConfigError(
            f"init_from cuts the student in one process, but the run has {distributed.world()} ranks: use "
            "make-student first, and give its folder as student"
        )
    if config.fsdp and device.type != "cuda":
        raise ConfigError(
            f"fsdp needs GPUs, but the device is {device.type}, where Trainer would silently train copies "
            "instead: leave it out, or use fully_shard in a loop of your own (examples/plain_pytorch.py)"
        )
    if config.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError("fsdp needs several ranks, but there is one: start this command with torchrun")


def _require_package(name: str, option: str, installed_by: str) -> None:
    if find_spec(name) is None:
        raise ConfigError(f"{option} needs the package {name}, which is not installed: pip install '{installed_by}'")


@contextlib.contextmanager
def logging_under(out: Path) -> Iterator[None]:
    """Trackers write below a run's folder, unless the environment names another place."""
    ours = {name: str(out / place) for name, place in _PLACES.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
