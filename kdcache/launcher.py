"""Options of who starts the workers of a command: of `dump-teacher`, `generate` and `train-student`.

Importing this costs nothing: the command line takes its options from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.options import option

_OF_A_LAUNCH = ("workers", "gpus_per_worker", "cpus_per_worker", "address")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Who starts the workers, how many, and what each of them may use."""

    launch: str | None = option("start the workers: local (on this machine) or ray (on a Ray cluster)", None)
    workers: int | None = option("--launch: number of workers (default: one for each GPU, or 1)", None)
    gpus_per_worker: float | None = option("--launch: GPUs of each worker (default: 1 where there are GPUs)", None)
    cpus_per_worker: int | None = option(
        "--launch: cores of each worker (default: 1 for ray, an equal share of this machine's for local)", None
    )
    address: str | None = option(
        "--launch ray: auto, HOST:PORT or ray://HOST:PORT (default: RAY_ADDRESS, else a cluster is started here)",
        None,
    )

    def require_launch(self, *launchers: str) -> None:
        """Refuse options that are out of range, or that no launcher would read.

        Args:
            launchers: those that the command knows.

        Raises:
            ConfigError: naming the option; or this process is one of several workers already.
        """
        if self.launch is None:
            for name in _OF_A_LAUNCH:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f'{name} is {getattr(self, name)}, but no workers are started: use launch="{launchers[-1]}"'
                    )
            return
        if self.launch not in launchers:
            raise ConfigError(f"launch is {self.launch}, but must be {' or '.join(launchers)}")
        for name in ("workers", "cpus_per_worker"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        gpus = self.gpus_per_worker
        if gpus is not None and not (0 <= gpus <= 1 or (1 < gpus < float("inf") and gpus == int(gpus))):
            raise ConfigError(f"gpus_per_worker is {gpus:g}, but must be a whole number, or a share of one GPU")
        if getattr(self, "worker", None) is not None:
            raise ConfigError("worker and launch exclude each other")
        if self.address is not None and self.launch != "ray":
            raise ConfigError(f'address is {self.address}, but only a Ray cluster has one: use launch="ray"')
