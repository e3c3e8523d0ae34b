"""Log-probabilities of a prompt's tokens from an OpenAI-compatible server, over HTTP.

What is asked is `/v1/completions` with token ids as the prompt, one token to generate, and vLLM's `prompt_logprobs`:
the k most likely tokens at each place of the prompt, and the token that stands there. Answers that are refused for load
(408, 429, 502, 503, 504) and connections that break are tried again, by urllib3, with growing pauses and after what the
server's `Retry-After` says.

Nothing of an answer is believed: model, length, types, ids and numbers are checked, and each fault is one sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from kdcache.errors import ConfigError, EngineError, ModelError

KEY = "KDCACHE_SERVER_KEY"
"""Environment variable with the key that the server asks for; it is sent as a bearer token, and written nowhere."""

_BUSY = (408, 429, 502, 503, 504)
_LONGEST_PAUSE = 30
_QUOTED = 200


class Completions:
    """A served model.

    Args:
        address: of the server's API, such as `http://host:8000/v1`.
        model: its name on the server; empty if the server has only one.
        concurrency: connections at the same time.
        timeout: seconds that an answer may take.
        retries: how often a request is sent again.

    Attributes:
        model: its name on the server.
        root: what the server says it was loaded from, None where it does not.
        context: the longest prompt that it takes, with room for the token that is generated; None if unknown.

    Raises:
        ConfigError: an address that is none, or a model that the server does not have.
        ModelError: there is no server, or not such a one.
    """

    def __init__(self, address: str, model: str, *, concurrency: int, timeout: float, retries: int) -> None:
        self.address = _address(address)
        self._timeout = timeout
        self._session = requests.Session()
        retry = Retry(
            total=retries, backoff_factor=0.5, backoff_max=_LONGEST_PAUSE, backoff_jitter=0.5, status_forcelist=_BUSY,
            allowed_methods=None, raise_on_status=False,
        )  # fmt: skip
        adapter = HTTPAdapter(pool_maxsize=concurrency, pool_block=True, max_retries=retry)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        if os.environ.get(KEY):
            self._session.headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        found = self._choose(model)
        self.model = str(found["id"])
        self.root = found["root"] if isinstance(found.get("root"), str) else None
        longest = found.get("max_model_len")
        self.context = longest - 1 if isinstance(longest, int) else None

    def tokenize(self, text: str) -> list[int] | None:
        """The server's ids of a text, without special tokens; None where it cannot be asked."""
        root = self.address.removesuffix("/v1")
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        status, found = self._ask("POST", f"{root}/tokenize", body)
        tokens = found.get("tokens") if status == 200 and isinstance(found, dict) else None
        return tokens if isinstance(tokens, list) and all(type(token) is int for token in tokens) else None

    def top(self, tokens: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k most likely tokens after each token of a prompt but the last.

        Args:
            tokens: n ids, at least 2.
            k: how many.

        Returns:
            `[n - 1, k]` ids and their log-probabilities, falling, and `[n - 1]` the log-probability of the token that
            follows.

        Raises:
            ConfigError: k is above what the server allows.
            ModelError: the server does not answer.
            EngineError: its answer is not what was asked for.
        """
        body = {
            "model": self.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": k,
        }  # fmt: skip
        status, found = self._ask("POST", f"{self.address}/completions", body)
        if status != 200:
            raise self._refusal(status, found, k)
        return self._parse(found, tokens, k)

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def _choose(self, model: str) -> dict[str, Any]:
        """What the server says of the model."""
        status, found = self._ask("GET", f"{self.address}/models", None)
        listed = found.get("data") if status == 200 and isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
        ):
            raise ModelError(
                f"{self.address}/models does not list models (status {status}); the teacher of engine server is the "
                "address of an OpenAI-compatible API, such as http://host:8000/v1"
            )
        names = [each["id"] for each in listed]
        if model and model not in names:
            raise ConfigError(f"the server {self.address} has no model {model}, but {', '.join(names) or 'none'}")
        if not model and len(names) != 1:
            raise ConfigError(
                f"the server {self.address} has {len(names)} models ({', '.join(names)[:_QUOTED]}); name one by "
                "engine_set model=NAME"
            )
        return next(each for each in listed if each["id"] == (model or names[0]))

    def _ask(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """Status and JSON of an answer; None for what is no JSON."""
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            answer = self._session.request(method, url, data=data, headers=headers, timeout=self._timeout)
        except requests.exceptions.RequestException as error:
            raise ModelError(f"the server {self.address} does not answer: {_why(error)}") from error
        try:
            return answer.status_code, orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            return answer.status_code, None

    def _refusal(self, status: int, found: Any, k: int) -> Exception:
        """The error for an answer that is not 200."""
        error = found.get("error", found) if isinstance(found, dict) else {}
        said = str(error.get("message", "")) if isinstance(error, dict) else str(error)
        if (most := re.search(r"logprobs.*max(?:imum)? allowed: (\d+)", said)) or "max_logprobs" in said:
            allowed = f" (it allows {most[1]})" if most else ""
            return ConfigError(
                f"k is {k}, above what the server {self.address} gives{allowed}; start it with --max-logprobs {k}, or "
                "lower k"
            )
        what = f": {said.splitlines()[0][:_QUOTED]}" if said.strip() else ""
        if status in _BUSY:
            return ModelError(f"the server {self.address} is still busy after all retries (status {status}){what}")
        return ModelError(f"the server {self.address} refuses a prompt (status {status}){what}")

    def _parse(self, found: Any, tokens: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def fault(what: str) -> EngineError:
            return EngineError(f"the server {self.address} gave {what}")

        if not isinstance(found, dict) or not isinstance(found.get("choices"), list) or len(found["choices"]) != 1:
            raise fault("an answer without one choice")
        if found.get("model") != self.model:
            raise fault(f"an answer of the model {str(found.get('model'))[:_QUOTED]}, where {self.model} was asked")
        choice = found["choices"][0]
        places = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
        if not isinstance(places, list):
            raise fault("no prompt_logprobs, so it cannot be a teacher; vLLM's server does")
        used = found.get("usage")
        read = used.get("prompt_tokens", len(places)) if isinstance(used, dict) else len(places)
        if {read, len(places)} != {len(tokens)}:
            raise fault(
                f"log-probabilities of {min(read, len(places))} tokens for a prompt of {len(tokens)}: it truncates"
            )
        n = len(tokens) - 1
        ids, logprobs, label = np.empty((n, k), np.int64), np.empty((n, k)), np.empty(n)
        for place, (token, entries) in enumerate(zip(tokens[1:], places[1:], strict=True)):
            try:
                pairs = sorted(((value["logprob"] + 0.0, -int(key)) for key, value in entries.items()), reverse=True)
                label[place] = entries[str(token)]["logprob"]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise fault(f"no log-probability of token {place + 1} of a prompt, or not as vLLM does") from None
            if not k <= len(pairs) <= k + 1:
                raise fault(f"{len(pairs)} log-probabilities of a token, where {k} were asked")
            logprobs[place] = [value for value, _ in pairs[:k]]
            ids[place] = [-negative for _, negative in pairs[:k]]
        return ids, logprobs, label


def require_exact(logprobs: np.ndarray, address: str) -> None:
    """Refuse log-probabilities that were rounded to few decimals or to 16 bits.

    Raises:
        EngineError: they were.
    """
    values = logprobs[(logprobs < 0) & (logprobs > -1000)]
    if len(values) < 16:
        return
    for decimals in range(1, 6):
        if (np.abs(values - np.round(values, decimals)) < 1e-9).all():
            raise EngineError(f"the server {address} rounds log-probabilities to {decimals} decimals")
    bits = values.astype(np.float32).view(np.uint32)
    if not (bits & 0xFFF).any():  # float16 has 10 bits of fraction, bfloat16 7
        raise EngineError(f"the server {address} rounds log-probabilities to 16 bits")


def _address(text: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is none, or has a password in it.
    """
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"teacher {text} is not the address of a server, such as http://host:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"the teacher's address has more than a host and a path; give the server's key in the variable {KEY}"
        )
    return text.rstrip("/")


def _why(error: Exception) -> str:
    """What went wrong on the way, in a few words."""
    text = str(error)
    for words in ("Connection refused", "timed out", "Name or service not known", "Connection reset", "aborted"):
        if words in text:
            return words.lower()
    return f"{type(error).__name__}: {text.splitlines()[0][:_QUOTED]}"
