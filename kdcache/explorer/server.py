"""Server: the explorer over a whole cache, for a browser on this machine; rows are read as they are looked at.

It listens on 127.0.0.1 alone and answers only requests that name it by that address or as `localhost`, so that no page
of another site can read through it (DNS rebinding). It only gives: `/` is the page, `/rows/N` a row, and
`/find?text=TEXT&from=N` where a text occurs from a row on. A search gives what it has after half a second and says
where to go on, so whoever asks may stop.
Memory: an open cache and one row at a time.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kdcache.errors import ConfigError, KdcacheError
from kdcache.explorer.explorer import Explorer
from kdcache.explorer.page import policy, render

ADDRESS = "127.0.0.1"

_LONGEST = 1000
"""Letters of a text that is looked for."""

_SAMPLED_ROWS = 8
"""Rows that the bytes of streams are measured on."""


class ExplorerServer(ThreadingHTTPServer):
    """Serves one explorer.

    Args:
        explorer: what is looked at.
        port: to listen on; 0 for a free one.

    Attributes:
        url: of the page.

    Raises:
        ConfigError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        if not 0 <= port < 1 << 16:
            raise ConfigError(f"port is {port}, but must be 0 to 65535")
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be had: {error.strerror or error}") from None
        self.url = f"http://{ADDRESS}:{self.server_port}/"
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        self._explorer, self._reading = explorer, threading.Lock()
        self._page: bytes | None = None

    def page(self) -> bytes:
        """The page, without rows; made once."""
        with self._reading:
            if self._page is None:
                rows = self._explorer.spread(_SAMPLED_ROWS)
                self._page = render(self._explorer.head(rows)).encode()
            return self._page

    def row(self, index: int) -> bytes:
        """A row.

        Raises:
            KdcacheError: it cannot be read.
        """
        with self._reading:
            return json.dumps(self._explorer.packed_row(index), ensure_ascii=False, allow_nan=False).encode()

    def find(self, text: str, start: int) -> bytes:
        """Where a text occurs from a row on, see `Explorer.find`.

        Raises:
            KdcacheError: a row cannot be read.
        """
        with self._reading:
            return json.dumps(self._explorer.find(text, start)).encode()

    def has_row(self, index: int) -> bool:
        """Whether there is such a row."""
        return index in self._explorer.rows


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer
    server_version, sys_version = "kdcache", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._say(HTTPStatus.FORBIDDEN, {"error": "this address does not belong to the explorer"})
            return
        path, _, query = self.path.partition("?")
        number = path.removeprefix("/rows/")
        if path == "/":
            self._send(HTTPStatus.OK, self.server.page(), "text/html; charset=utf-8")
        elif path == "/find":
            self._find(query)
        elif path != number and number.isascii() and number.isdecimal() and len(number) < 20:
            self._row(int(number))
        else:
            self._say(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def _row(self, index: int) -> None:
        if not self.server.has_row(index):
            self._say(HTTPStatus.NOT_FOUND, {"error": f"there is no row {index}"})
            return
        try:
            self._send(HTTPStatus.OK, self.server.row(index), "application/json")
        except KdcacheError as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

    def _find(self, query: str) -> None:
        asked = urllib.parse.parse_qs(query, max_num_fields=4)
        text, start = (asked.get(name, [""])[0] for name in ("text", "from"))
        if not 0 < len(text) <= _LONGEST or not (start.isascii() and start.isdecimal() and len(start) < 20):
            self._say(HTTPStatus.BAD_REQUEST, {"error": f"a search is for 1 to {_LONGEST} letters, from a row on"})
            return
        try:
            self._send(HTTPStatus.OK, self.server.find(text, int(start)), "application/json")
        except KdcacheError as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

    def _say(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", policy(live=True)),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the command."""
