"""An S3 endpoint that is busy: a proxy that answers a share of all requests with 503, and cuts off some others."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_OF_A_CONNECTION = {"connection", "transfer-encoding", "keep-alive", "content-length", "expect"}


class BusyEndpoint:
    """Passes requests on to an endpoint; use it as a context manager.

    Args:
        url: of the endpoint.
        busy: share of the requests that are answered with 503 and go no further.
        lost: share that is cut off: half of these before they are passed on, the others instead of the answer.
        seed: of the choice.

    Attributes:
        url: its own.
        done: how many requests were `busy`, `cut`, `lost` and `passed`.
    """

    def __init__(self, url: str, busy: float, lost: float = 0.0, seed: int = 0) -> None:
        self.done: Counter[str] = Counter()
        self._host, self._shares, self._random = urlsplit(url).netloc, (busy, lost), random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.endpoint = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fate(self) -> str:
        """What becomes of the next request."""
        busy, lost = self._shares
        with self._lock:
            drawn = self._random.random()
            fates = (("busy", busy), ("cut", busy + lost / 2), ("lost", busy + lost), ("passed", 1.1))
            found = next(name for name, below in fates if drawn < below)
            self.done[found] += 1
        return found

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        """The endpoint's answer."""
        connection = http.client.HTTPConnection(self._host, timeout=300)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    endpoint: BusyEndpoint


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def answer(self) -> None:
        body, endpoint = self._body(), self.server.endpoint
        fate = endpoint.fate()
        if fate == "busy":
            return self._send(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        if fate == "cut":
            return self._cut()
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_CONNECTION}
        answer = endpoint.ask(self.command, self.path, {**headers, "Content-Length": str(len(body))}, body)
        return self._cut() if fate == "lost" else self._send(*answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: list[Any], body: bytes) -> None:
        self.send_response_only(status)
        given = dict(headers) if self.command == "HEAD" and status != 503 else {}
        length = given.get("Content-Length", given.get("content-length", str(len(body))))
        for name, value in headers:
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        self.send_header("Content-Length", "0" if self.command == "HEAD" and status == 503 else length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass
