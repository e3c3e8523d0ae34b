"""A hub of one data set, `me/stories`, as its own client asks for it: python hub.py FOLDER, which prints its URL.

It answers from the folder, and writes a line for each range of a file that it gives.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import sys
from pathlib import Path
from typing import Any

COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root = Path(sys.argv[-1])

    def log_message(self, *values: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if asked := re.fullmatch(r"/datasets/me/stories/resolve/[^/]+/(.*)", path):
            self._give_file(asked[1])
        elif re.fullmatch(r"/api/datasets/me/stories(/revision/[^/]+)?", path):
            names = [{"rfilename": file.relative_to(self.root).as_posix()} for file in self.root.rglob("*.*")]
            self._give(200, json.dumps({"id": "me/stories", "sha": COMMIT, "tags": [], "siblings": names}).encode())
        elif asked := re.fullmatch(r"/api/datasets/me/stories/tree/[^/]+/?(.*)", path):
            self._give(200, json.dumps([self._entry(file) for file in (self.root / asked[1]).iterdir()]).encode())
        else:
            self._give(404, b"{}")

    def _entry(self, file: Path) -> dict[str, Any]:
        kind, size = ("directory", 0) if file.is_dir() else ("file", file.stat().st_size)
        return {"type": kind, "path": file.relative_to(self.root).as_posix(), "size": size, "oid": COMMIT}

    def _give_file(self, name: str) -> None:
        if not (self.root / name).is_file():
            self._give(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = (self.root / name).read_bytes()
        headers = {"ETag": hashlib.sha1(data).hexdigest(), "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")):
            self._give(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        sys.stdout.write(f"{name} {first} {last}\n")
        sys.stdout.flush()
        self._give(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _give(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
