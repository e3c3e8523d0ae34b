"""A Ray cluster: connected to, or started on this machine, for as long as a command needs it.

Guarantee: where nobody answers, or somebody who is no Ray cluster, a sentence says so within half a minute (Ray itself
would wait for minutes). Ray's handler of SIGTERM, which would exit from anywhere, is taken back, and what Ray prints of
nodes that leave does not come out among a command's results.
Cost: some seconds to connect; about ten to start a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError, one_line
from kdcache.plugins import VARIABLE as PLUGINS

LOCAL = "local"
"""The address of a cluster that is started on this machine."""

_SECONDS = 15.0
"""How long to wait for an answer."""

_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS

_HANDED_ON = (
    PLUGINS, "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "HF_DATASETS_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY",
)  # fmt: skip


@contextlib.contextmanager
def connected(address: str | None, cpus: float, gpus: float) -> Iterator[Any]:
    """Ray, connected.

    Args:
        address: of the cluster, as Ray takes it; None for that of RAY_ADDRESS, or else one of this machine, which is
            started here and ends with the context.
        cpus: cores that each worker will ask for.
        gpus: GPUs likewise.

    Yields:
        The module `ray`.

    Raises:
        ConfigError: Ray is not installed, nobody answers, or a cluster that is started here has no room for a worker.
    """
    require_ray()
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address not in (LOCAL, "auto"):
        _require_answer(address)
    before = signal.getsignal(signal.SIGTERM) if _in_main_thread() else None
    mine = {"include_dashboard": False} if address == LOCAL else {}
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say, the error says
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **mine)
        except (
            Exception
        ) as error:  # Ray raises plain ones, too: for a cluster of another version, or one that is too busy
            raise ConfigError(f"the Ray cluster {address} cannot be used: {one_line(error)}") from error
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        try:
            if address == LOCAL:
                _require_room(ray.cluster_resources(), cpus, gpus)
            yield ray
        finally:
            ray.shutdown()


def require_ray() -> None:
    """Refuse a launch by Ray where it is not installed.

    Raises:
        ConfigError: it says how to install it.
    """
    if find_spec("ray") is None:
        raise ConfigError("launch=\"ray\" needs the package ray, which is not installed: pip install 'kdcache[ray]'")


def has_gpus(ray: Any) -> bool:
    """Whether any node of the cluster has a GPU."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def handed_on() -> dict[str, Any]:
    """The environment of a worker, for Ray: plug-ins, and what keeps libraries quiet and idle threads asleep."""
    return {"env_vars": {name: os.environ[name] for name in _HANDED_ON if name in os.environ}}


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _require_answer(address: str) -> None:
    """Refuse an address at which nobody answers, or somebody who does not speak as a Ray cluster does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"address is {address}, but must be auto, HOST:PORT or ray://HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS) as connection:
            speaks = _speaks_grpc(connection)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {one_line(error)}") from None
    if not speaks:
        raise ConfigError(f"what answers at {address} is no Ray cluster")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side answers the first words of HTTP/2, on which gRPC and so Ray is built, as it must."""
    said = b""
    with contextlib.suppress(OSError):
        connection.sendall(_PREFACE)
        while len(said) < len(_SETTINGS) and (more := connection.recv(64)):
            said += more
    return said[3:4] == _SETTINGS[3:4]  # the kind of its first frame


def _require_room(found: dict[str, float], cpus: float, gpus: float) -> None:
    """Refuse workers of which none would ever start."""
    for name, option, wanted, has in (
        ("cores", "cpus_per_worker", cpus, found.get("CPU", 0)),
        ("GPUs", "gpus_per_worker", gpus, found.get("GPU", 0)),
    ):
        if wanted > has:
            raise ConfigError(f"{option} is {wanted:g}, but this machine has {has:g} {name}")
