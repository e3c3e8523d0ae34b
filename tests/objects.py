"""A real S3 endpoint for tests: moto's server in a process of its own, and a bucket as its owner sees it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Endpoint:
    """The server process. Its log says what was asked of it."""

    def __init__(self, log: Path) -> None:
        self.url, self._log = f"http://127.0.0.1:{free_port()}", log
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self.url.rpartition(":")[2]]
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/moto-api/data.json", timeout=5):
                return True
        except OSError:
            return False

    def check_keys(self, wanted: bool) -> None:
        """Whether requests signed with unknown keys are turned away."""
        free = b"0" if wanted else b"inf"  # requests that pass unchecked
        request = urllib.request.Request(self.url + "/moto-api/reset-auth", free, {"Content-Type": "text/plain"})
        with urllib.request.urlopen(request, timeout=60):
            pass

    def requests(self) -> list[tuple[str, str]]:
        """Method and path of everything that was asked so far."""
        return re.findall(r'"(?:\x1b\[[0-9;]*m)*([A-Z]+) (/\S*) HTTP', self._log.read_text())

    def asked(self, url: str, since: int = 0) -> list[tuple[str, str]]:
        """Method and path, inside the bucket of this URL, of the requests after the first `since`."""
        bucket = url.removeprefix("s3://").partition("/")[0]
        found = self.requests()[since:]
        return [(method, path.removeprefix(f"/{bucket}/")) for method, path in found if bucket in path]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=300)


class Bucket:
    """A bucket, past kdcache."""

    def __init__(self, fs: Any, url: str) -> None:
        self.fs, self.url, self._root = fs, url, fs._strip_protocol(url)
        self.fs.mkdir(self._root)

    def names(self, prefix: str) -> list[str]:
        """Names below a prefix, relative to it."""
        return [path.removeprefix(f"{self._root}/{prefix}/") for path in self.fs.find(f"{self._root}/{prefix}")]

    def get(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self._root}/{name}"))

    def put(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self._root}/{name}", data)

    def delete(self, name: str) -> None:
        self.fs.rm_file(f"{self._root}/{name}")

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a local cache under a prefix as it lies; its URL."""
        self.fs.put(str(folder), f"{self._root}/{prefix}", recursive=True)
        return f"{self.url}/{prefix}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
