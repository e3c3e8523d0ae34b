"""What many tests stand on: a ready-made process is another process, in all that they look at."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import Ranks, ReadyMade, python


def test_it_has_its_own_streams_code_folder_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python("-c", "")  # the server is there before the variable is
    monkeypatch.setenv("KDCACHE_A_TEST", "7")
    code = """
import os, sys
print(os.environ["KDCACHE_A_TEST"], os.getcwd(), sys.argv[1], os.getpid())
print("words", file=sys.stderr)
os.environ["KDCACHE_A_TEST"] = "8"
sys.exit(3)
"""
    done = python("-c", code, "x", cwd=tmp_path)
    value, folder, argument, pid = done.stdout.split()
    assert (value, folder, argument, done.stderr, done.returncode) == ("7", str(tmp_path), "x", "words\n", 3)
    assert int(pid) != os.getpid() and os.environ["KDCACHE_A_TEST"] == "7"
    done = python("-c", "import os; print(len(os.environ)); no", env={"OMP_NUM_THREADS": "1"})
    assert done.stdout == "1\n" and "NameError" in done.stderr and done.returncode == 1


def test_it_is_killed_as_any_other() -> None:
    process = ReadyMade("-c", "import time; print('here', flush=True); time.sleep(60)")
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_it_has_imported_what_takes_long_and_run_nothing() -> None:
    heavy = ("torch", "transformers", "numba", "kdcache.student.train")
    code = f"import sys, threading; print({set(heavy)} - set(sys.modules), threading.active_count())"
    assert python("-c", code).stdout == "set() 1\n"


def test_if_one_rank_fails_the_others_are_killed() -> None:
    ranks = Ranks(2, "-c", "import os, time; time.sleep(60 * int(os.environ['RANK'])); no")
    _, words = ranks.communicate()
    assert "NameError" in words and ranks.returncode
    assert ranks.processes[1].returncode == -signal.SIGKILL
