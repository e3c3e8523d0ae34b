"""The command `doctor`. `main.py` registers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from kdcache.options import option
from kdcache_cli.frame import Output

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `doctor`."""

    folder: str | None = option("folder whose disk is measured (default: that of temporary files)", None)
    store: str | None = option("folder or URL: try to write, read and delete a small object there", None)
    self_test: bool = option("dump, verify and train something tiny, in some ten seconds", True)
    device: str = option("where that runs: auto, cpu, cuda, cuda:1 or mps", "auto")


def doctor(options: DoctorOptions, output: Output) -> None:
    """Say what of this machine works: versions, devices, disk, store, and a tiny dump and training."""
    from kdcache.doctor.examine import examine

    found = examine(
        folder=options.folder, store=options.store, self_test=options.self_test, device=options.device,
        on_stage=output.note,
    )  # fmt: skip
    output.result(found, lambda console: _show(console, found))
    if not found["ok"]:
        raise typer.Exit(1)


def _show(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)

    def line(name: str, value: str) -> None:
        table.add_row(Text(name, style="bold"), Text(value))

    line("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    line("extras", ", ".join(f"{name} {version or 'not installed'}" for name, version in found["extras"].items()))
    for device in found["devices"]:
        cores = f"{device['cores']} cores, " if "cores" in device else ""
        line(device["kind"], f"{device['name']}: {cores}{_gb(device['bytes'])}, {_gb(device['free_bytes'])} free")
    disk = found["disk"]
    speeds = (disk["write_bytes_per_second"] / 1e6, disk["read_bytes_per_second"] / 1e6)
    room = "" if disk["free_bytes"] is None else f", {_gb(disk['free_bytes'])} free"
    line("disk", f"{disk['folder']}: {speeds[0]:,.0f} MB/s written, {speeds[1]:,.0f} MB/s read{room}")
    if found["store"]:
        store = found["store"]
        line("store", f"{store['url']}: {'works' if store['ok'] else 'does not work'}, {store['seconds']:.1f} s")
    if found["self_test"]:
        tested = found["self_test"]
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in tested["seconds"].items())
        line("self-test", f"{'works' if tested['ok'] else 'failed'} on {tested['device']}: {times or 'nothing'}")
    console.print(table)
    for problem in found["problems"]:
        console.print(f"problem: {problem}", markup=False)
    console.print("everything that was looked at works" if found["ok"] else f"{len(found['problems'])} problem(s)")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
