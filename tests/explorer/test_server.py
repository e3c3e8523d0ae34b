"""`explore`: what its server gives, and to whom."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcache import open_cache
from kdcache.errors import ConfigError
from kdcache.explorer.explorer import Explorer
from kdcache.explorer.server import ExplorerServer
from kdcache.explorer.token_texts import TokenTexts
from tests.explorer.unpacking import unpack


@pytest.fixture
def server(cache: Path) -> Iterator[ExplorerServer]:
    with ExplorerServer(Explorer(str(cache))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(
    server: ExplorerServer, path: str, host: str | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return found


def test_it_listens_on_this_machine_alone(server: ExplorerServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, body = get(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in headers["Content-Security-Policy"] and b'"live":true' in body


def test_a_row_is_that_of_the_cache(server: ExplorerServer, cache: Path) -> None:
    opened = open_cache(cache)
    status, _, body = get(server, f"/rows/{len(opened) - 1}")
    payload = json.loads(body)
    packed, targets = opened.read_packed(len(opened) - 1)
    own = unpack(payload["own"])
    assert status == 200 and payload["index"] == len(opened) - 1
    assert np.array(payload["texts"]["ids"])[own["tokens"]].tolist() == packed.tokens.tolist()
    assert own["count"].tolist() == targets.count[targets.count > 0].tolist()


@pytest.mark.parametrize(
    "path", ["/rows/999999", "/rows/-1", "/rows/x", "/rows/", "/rows/%C2%B2", "/../kdcache.json", "/etc"]
)
def test_nothing_else_is_given(server: ExplorerServer, path: str) -> None:
    status, _, body = get(server, path)
    assert status == 404 and "there is no" in json.loads(body)["error"]


def test_a_text_is_found_in_the_whole_cache(server: ExplorerServer, cache: Path) -> None:
    opened = open_cache(cache)
    texts = TokenTexts(opened.load_tokenizer())
    expected = []
    for index in range(len(opened)):
        pieces = [texts[int(token)] for token in opened[index].tokens[opened[index].segments >= 0]]
        text = "".join(pieces)
        for match in re.finditer("heron", text, re.IGNORECASE):
            before = itertools.accumulate(map(len, pieces))
            expected.append([index, sum(end <= match.start() for end in before)])
    status, _, body = get(server, "/find?text=HERON&from=0")
    found = json.loads(body)
    assert status == 200 and found == {"matches": expected, "rows": len(opened), "next": None}
    one = Explorer(str(cache)).find("heron", 1, seconds=0)
    assert one["rows"] == 1 and one["next"] == 2  # whoever asks may stop after each row
    assert one["matches"] == [tuple(match) for match in expected if match[0] == 1]
    for query in ("", "text=", "text=a", "text=a&from=-1", "text=a&from=x", f"text={'a' * 1001}&from=0"):
        assert get(server, f"/find?{query}")[0] == 400
    assert json.loads(get(server, f"/find?text=a&from={len(opened) + 5}")[2])["next"] is None


def test_other_hosts_are_refused(server: ExplorerServer) -> None:
    port = server.server_port
    assert get(server, "/", f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        status, _, body = get(server, "/rows/0", host)
        assert status == 403 and b"tokens" not in body
    assert get(server, "/", method="POST")[0] == 501


def test_a_row_that_is_damaged_is_said_to_be(cache: Path, tmp_path: Path) -> None:

    copy = tmp_path / "c"
    shutil.copytree(cache, copy)
    shard = sorted((copy / "shards").iterdir())[-1]
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 3, len(data) // 2):
        data[place] ^= 255
    shard.write_bytes(data)
    with ExplorerServer(Explorer(str(copy))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            replies = [get(server, f"/rows/{index}") for index in range(len(open_cache(copy, partial=True)))]
        finally:
            server.shutdown()
            thread.join()
    broken = [json.loads(body)["error"] for status, _, body in replies if status == 500]
    assert broken and all(shard.name in error for error in broken)
    assert any(status == 200 for status, _, _ in replies)


def test_ports(server: ExplorerServer, cache: Path) -> None:
    explorer = Explorer(str(cache))
    with pytest.raises(ConfigError, match=f"port {server.server_port} cannot be had"):
        ExplorerServer(explorer, server.server_port)
    with pytest.raises(ConfigError, match="port is 70000, but must be 0 to 65535"):
        ExplorerServer(explorer, 70_000)
