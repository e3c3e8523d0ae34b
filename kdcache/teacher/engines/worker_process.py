"""A process that an engine runs its teacher in: started, asked, and ended together with everything that it started.

It speaks frames over its standard input and output; what it prints goes into a log, of which an error quotes the last
line. It is in a process group of its own, which is killed when the engine is closed; and when this process dies without
closing it, its input ends, and so does it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache import stopping
from kdcache.errors import EngineError, ModelError
from kdcache.teacher.engines.frames import Arrays, FrameError, pack_frame, read_frame

_LOG_TAIL = 1 << 14
_LONGEST_LINE = 300


class WorkerProcess:
    """A process that answers frames.

    Args:
        name: of the engine, for messages.
        command: what is run.
        environment: all of its environment variables.
        timeout: seconds that an answer may take.

    Raises:
        ModelError: it cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._log = tempfile.TemporaryFile(prefix="kdcache-engine-")  # noqa: SIM115 - closed by `close`
        try:
            with stopping.shielded():  # what signals all processes of a job is not to end this one before its shard
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=dict(environment),
                    start_new_session=True, bufsize=0,
                )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise ModelError(f"the engine {name} cannot run {command[0]}: {error.strerror or error}") from None

    def ask(self, message: Mapping[str, Any], arrays: Arrays | None = None) -> tuple[dict[str, Any], Arrays]:
        """Send a frame and wait for the answer.

        Raises:
            ModelError: the process refuses, in its own words; or it has failed or ended, with the last line of its log.
            EngineError: the answer is not a frame, or does not come.
        """
        assert self._process.stdin is not None
        try:
            self._write(pack_frame(message, arrays or {}))
            frame = read_frame(self._reader())
        except BrokenPipeError:
            frame = None
        except FrameError as error:
            raise EngineError(f"the process of the engine {self._name} gave {error}{self._said()}") from None
        if frame is None:
            raise ModelError(f"the process of the engine {self._name} ended{self._how()}{self._said()}")
        answer, found = frame
        if "refused" in answer:
            raise ModelError(str(answer["refused"]))
        if "failed" in answer:
            raise ModelError(f"the process of the engine {self._name} failed: {str(answer['failed'])[:_LONGEST_LINE]}")
        return answer, found

    def close(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        left = memoryview(data)
        while left:
            left = left[self._process.stdin.write(left) or 0 :]

    def _reader(self) -> Any:
        """A function that reads so many bytes before the time is over."""
        pipe, until = self._process.stdout, time.monotonic() + self._timeout
        assert pipe is not None

        def read(size: int) -> bytes:
            data = bytearray()
            with selectors.DefaultSelector() as waiting:
                waiting.register(pipe, selectors.EVENT_READ)
                while len(data) < size:
                    if not waiting.select(max(0.0, until - time.monotonic())):
                        raise EngineError(
                            f"the process of the engine {self._name} gave no answer for {self._timeout:g} s"
                            f"{self._said()}; raise engine_set timeout if it only needs longer"
                        )
                    part = os.read(pipe.fileno(), min(size - len(data), 1 << 20))
                    if not part:
                        break
                    data += part
            return bytes(data)

        return read

    def _how(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return ""
        return f" by signal {-code}" if code < 0 else f" with exit code {code}"

    def _said(self) -> str:
        """The last line of its log, in words."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"; the last line of its log: {lines[-1][:_LONGEST_LINE]}" if lines else ""
