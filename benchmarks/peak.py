"""What a command prints, and the most memory that it has had at once, whatever the process that measures it holds.

The kernel tells of a process, when it has ended, the larger of its own peak and of what its parent held when the
program was started. So the command's parent is a small process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PARENT = """
import os, sys
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
with open(sys.argv[1], "w") as out:
    print(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024), file=out)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def output_and_peak(words: Sequence[str], environment: dict[str, str] | None = None) -> tuple[bytes, int]:
    """The standard output of a command, and its peak memory in bytes.

    Raises:
        CalledProcessError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        command = [sys.executable, "-S", "-c", PARENT, str(peak), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment or dict(os.environ), check=True)
        return done.stdout, int(peak.read_text())
