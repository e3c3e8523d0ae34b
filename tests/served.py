"""A server of ours that answers as vLLM's does, for a bigram teacher; and answers wrongly on demand."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

LOGPROBS = (3 * torch.randn(320, 320, generator=torch.Generator().manual_seed(3))).double().log_softmax(-1)
"""Of what follows each token."""


@dataclass
class Served:
    """The server's state, which a test may change while it runs."""

    tokenizer: Any
    root: str
    models: list[str] = field(default_factory=lambda: ["teacher"])
    max_logprobs: int = 20
    busy_every: int = 0
    """Every so many requests one is answered with 503."""
    dies_after: int | None = None
    """Prompts after which no connection is answered any more."""
    changes: dict[str, Any] = field(default_factory=dict)
    prompts: int = 0
    requests: int = 0
    most_at_once: int = 0
    at_once: int = 0
    address: str = ""

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The answer to a prompt."""
        k, tokens = body["prompt_logprobs"], body["prompt"]
        if k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": said, "code": 400}}
        places: list[dict[str, Any] | None] = [None]
        for one, token in itertools.pairwise(tokens):
            top = LOGPROBS[one].topk(k)
            entries = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            entries[token] = LOGPROBS[one, token].item()
            change = self.changes.get("numbers", lambda value: value)
            places.append({str(i): {"logprob": change(v), "rank": 1, "decoded_token": "."} for i, v in entries.items()})
        answer = {
            "model": body["model"], "choices": [{"index": 0, "text": ".", "prompt_logprobs": places}],
            "usage": {"prompt_tokens": len(tokens)},
        }  # fmt: skip
        return 200, self.changes.get("answer", lambda value: value)(answer)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A running server of the tokenizer in a folder."""
    from kdcache.pretrained import load_tokenizer

    state, lock = Served(load_tokenizer(folder), str(folder)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def answer(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            listed = [
                {"id": name, "object": "model", "root": state.root, "max_model_len": 129} for name in state.models
            ]
            found = state.changes.get("models", {"object": "list", "data": listed})
            self.answer(200 if self.path == "/v1/models" else 404, found)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests += 1
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
                number = state.requests
                state.prompts += "prompt_logprobs" in body
                dead = state.dies_after is not None and state.prompts > state.dies_after
            try:
                if dead:
                    self.close_connection = True
                elif state.busy_every and number % state.busy_every == 0:
                    self.answer(503, {"error": "busy"})
                elif self.path == "/tokenize" and "tokenize" not in state.changes:
                    self.answer(200, {"tokens": state.tokenizer.encode(body["prompt"], add_special_tokens=False)})
                elif self.path == "/tokenize" and state.changes["tokenize"] is not None:
                    self.answer(200, {"tokens": state.changes["tokenize"]})
                elif self.path == "/v1/completions":
                    self.answer(*state.complete(body))
                else:
                    self.answer(404, {"detail": "Not Found"})
            finally:
                with lock:
                    state.at_once -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
