"""torchrun as `kdcache_cli` starts it: its exit code is that of its ranks, and SIGUSR1 is for them alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import ReadyMade, wait_until

pytestmark = pytest.mark.slow

RANK = """
import os, pathlib, sys, time
from kdcache import stopping
end, folder = sys.argv[1:]
try:
    with stopping.handled():
        pathlib.Path(folder, os.environ["RANK"]).touch()
        if end == "stop":
            time.sleep(600)
except stopping.Stopped:
    sys.exit(75)
if end == "die":
    os.kill(os.getpid(), 9)
sys.exit(int(end))
"""


def launch(tmp_path: Path, end: str) -> ReadyMade:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    found = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(Path.cwd() / "cli")]), "OMP_NUM_THREADS": "1"}
    options = ["--standalone", "--nproc-per-node", "2", script, end, tmp_path]
    return ReadyMade("-m", "kdcache_cli.torchrun", *options, env={**os.environ, **found})


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("2", 2), ("75", 75), ("die", 128 + signal.SIGKILL)])
def test_its_exit_code_is_that_of_its_ranks(tmp_path: Path, end: str, code: int) -> None:
    assert launch(tmp_path, end).wait() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_of_them_is_a_stop(tmp_path: Path, number: int) -> None:
    """As SLURM sends it: to the launcher and to the ranks."""
    launcher = launch(tmp_path, "stop")
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"), launcher, "a rank did not begin")
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in (launcher.pid, *map(int, ranks)):
        os.kill(pid, number)
    assert launcher.wait() == 75
