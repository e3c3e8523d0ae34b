"""What a dump asks of an object store, counted at the server: the real code against an S3 server on this machine.

`ShardMaker` is driven as `dump` drives it, by a first worker that creates the cache and a second that completes it, for
two numbers of shards; what differs is the part that grows with them.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cluster_model import Protocol

SHARDS = (6, 12)
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Counted:
    """An S3 server whose requests are counted by kind."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        self.counts: Counter[str] = Counter()
        moto = DomainDispatcherApplication(create_backend_app)

        def application(environ: dict[str, Any], start_response: Any) -> Any:
            self.counts[_kind(environ)] += 1
            return moto(environ, start_response)

        self.server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def since(self, before: Counter[str]) -> Counter[str]:
        """Counted after a copy of the counts was taken."""
        return self.counts - before


def _kind(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], environ["QUERY_STRING"]
    if method == "GET" and re.search(r"(^|&)(list-type|prefix|delimiter)=", query):
        return "LOOK" if "max-keys=1&" in f"{query}&" else "LIST"  # whether a name is a folder; one answer, not pages
    if method == "POST" and re.search(r"(^|&)delete(=|&|$)", query):
        return "DELETE"
    return "PUT" if method == "POST" else str(method)


@contextlib.contextmanager
def counted_server() -> Iterator[Counted]:
    """A server, and the environment in which S3 means it."""
    server = Counted()
    wanted = {**KEYS, "AWS_ENDPOINT_URL": server.url}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield server
    finally:
        server.server.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def count(teacher: Path, corpus: Path) -> dict[int, dict[str, Counter[str]]]:
    """Requests by step and kind, for each number of shards of `SHARDS`."""
    import boto3

    from kdcache.teacher.config import DumpConfig
    from kdcache.teacher.shard_maker import ShardMaker

    found: dict[int, dict[str, Counter[str]]] = {}
    with counted_server() as server:
        boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="count")
        for shards in SHARDS:
            config = DumpConfig(
                teacher=str(teacher), corpus=str(corpus), out=f"s3://count/of-{shards}", seq_len=128, device="cpu",
                limit_docs=2 * shards, docs_per_shard=2, k=8,
            )  # fmt: skip
            steps: dict[str, Counter[str]] = {}
            for start, worker, end in (("create", 0, "finish"), ("join", 1, "seal")):
                before = server.counts.copy()
                with ShardMaker(config) as maker:
                    mine = range(worker, shards, 2)
                    maker._prepare()  # which `make` would do at its first shard
                    steps[start] = server.since(before)
                    before = server.counts.copy()
                    for shard in mine:
                        maker.make(shard, lambda *_: None)
                    steps[f"{len(mine)} shards"] = server.since(before)
                    before = server.counts.copy()
                    maker.writer.finish(mine)
                    steps[end] = server.since(before)
            found[shards] = steps
    return found


def protocol(counted: dict[int, dict[str, Counter[str]]], beat: dict[str, float]) -> Protocol:
    """The requests of each step, what grows with the shards apart."""
    few, many = (counted[shards] for shards in SHARDS)

    def grows(step: str, by: int) -> dict[str, float]:
        return {
            kind: (many[step][kind] - few[step][kind]) / by
            for kind in many[step]
            if many[step][kind] != few[step][kind]
        }

    def base(step: str, each: dict[str, float], by: int) -> dict[str, float]:
        return {kind: many[step][kind] - each.get(kind, 0.0) * by for kind in many[step]}

    own, all_ = SHARDS[1] // 2, SHARDS[1]
    finish_own = grows("finish", own - SHARDS[0] // 2)
    seal_each = grows("seal", all_ - SHARDS[0])
    made = many[f"{own} shards"]
    return Protocol(
        create=dict(many["create"]), join=dict(many["join"]), shard={kind: made[kind] / own for kind in made},
        finish=base("finish", finish_own, own), finish_own=finish_own,
        seal=base("seal", seal_each, all_), seal_each=seal_each, beat=beat,
    )  # fmt: skip
