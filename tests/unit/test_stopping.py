"""Signals end a command between two units of its work; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdcache import stopping
from kdcache.errors import CacheError
from tests.processes import ReadyMade, wait_until

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


def send(number: int) -> None:
    """Send a signal to this process, and let Python handle it."""
    os.kill(os.getpid(), number)
    time.sleep(0)


@BOTH
def test_at_once_outside_of_a_block_and_at_its_end_inside(number: int) -> None:
    done = []
    with pytest.raises(stopping.Stopped), stopping.handled():
        send(number)
        done.append("never")
    with pytest.raises(stopping.Stopped), stopping.handled():
        with stopping.deferred():
            with stopping.deferred():
                send(number)
                stopping.check(grace=60)
                assert stopping.requested()
                done.append("unit")
            done.append("never")
        done.append("never")
    assert done == ["unit"] and not stopping.requested()
    with stopping.handled(), stopping.deferred():  # what was asked of one command is not asked of the next
        stopping.check()


def test_the_grace_time_ends() -> None:
    with stopping.handled(), stopping.deferred():
        with pytest.raises(stopping.Stopped):
            send(signal.SIGTERM)
            stopping.check()
        stopping.check(grace=60)
        with pytest.raises(stopping.Stopped):
            while True:
                stopping.check(grace=0.05)
        stopping._state.asked_at = None


def test_a_second_signal_stops_a_block_but_not_a_copy_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    with pytest.raises(stopping.Stopped), stopping.handled(), stopping.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        done.append("goes on")
        monkeypatch.setattr(stopping, "REPEATED", 0.0)
        send(signal.SIGTERM)
        done.append("never")
    assert done == ["goes on"]


SLOW_MODULE = """
import pathlib, time
try:
    pathlib.Path("begun").touch()
    for _ in range(40):
        time.sleep(0.01)
except BaseException:
    pathlib.Path("broken").touch()
    raise
"""


def test_no_import_is_broken_off(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_MODULE)
    code = "import time\nfrom kdcache import stopping\ntry:\n    with stopping.handled():\n"
    code += "        import slow\n        [time.sleep(0.01) for _ in range(6000)]\n"
    code += "except stopping.Stopped:\n    raise SystemExit(stopping.EXIT_CODE)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert (process.returncode, err) == (stopping.EXIT_CODE, "") and not (tmp_path / "broken").exists()


def test_an_error_after_a_signal_is_the_stop_and_any_other_stays() -> None:
    with pytest.raises(stopping.Stopped), stopping.handled(), stopping.deferred():
        send(signal.SIGTERM)
        raise CacheError("a reader was killed")
    with pytest.raises(CacheError), stopping.handled(), stopping.deferred():
        raise CacheError("a reader was killed")


def test_the_handlers_of_whoever_called_come_back() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.handled():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_a_helper_ends_when_it_is_asked_twice(tmp_path: Path) -> None:
    with stopping.shielded():
        early = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(6000)"])
    early.send_signal(signal.SIGTERM)
    early.send_signal(signal.SIGUSR1)
    code = "import pathlib, sys, time; from kdcache import stopping; stopping.obey_parent(0); "
    code += "pathlib.Path(sys.argv[1]).touch(); [time.sleep(0.01) for _ in range(60000)]"
    helper = ReadyMade("-c", code, tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, helper, "it did not begin")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(helper.pid, number)
    time.sleep(0.2)
    assert helper.poll() is None and early.poll() is None
    helper.terminate()
    assert helper.wait() == 0
    early.kill()
    early.wait()
