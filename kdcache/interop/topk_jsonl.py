"""Top-k JSON lines: what a server's API says of a text, one answer a line, as vLLM and OpenAI's completions give it.

    vLLM     {"prompt_token_ids": [5, 7, ...], "prompt_logprobs": [null, {"7": {"logprob": -0.1, "rank": 1}, ...}, ...]}
    OpenAI   {"prompt_token_ids": [...], "logprobs": {"top_logprobs": [null, {"token_id:7": -0.1, ...}, ...]}}

both also inside `choices[0]` of a whole answer; `tokens` or `input_ids` may name the token ids, too. List t is the
distribution that token t was taken from, after the tokens before it: the target of slot t - 1. Servers give the k most
likely tokens, and the token itself where it is not among them; that one is taken for the label's log-probability, and
is no entry.

Written is vLLM's form, a piece of a row a line. A slot without a target is null.

Sources: vllm-project/vllm, `vllm/logprobs.py` and `vllm/entrypoints/openai`; arcee-ai/DistillKit,
`distillkit/sample_logits_vllm.py`; axolotl-ai-cloud/axolotl, `src/axolotl/integrations/kd/trainer.py`.

Shapes: n tokens, m targets, K entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from kdcache.cache import Cache
from kdcache.errors import CorpusError
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.listed_records import ListedRecords, listed_row, token_number
from kdcache.interop.pieces import Piece, pieces_of, sampled_lost
from kdcache.interop.records import integers
from kdcache.interop.row_table import lost as table_lost
from kdcache.interop.tables import OnRow, publish
from kdcache.store.atomic_files import NewFile
from kdcache.store.manifest import Manifest

_TOKENS = ("prompt_token_ids", "tokens", "input_ids")


class TopkJsonl(ListedRecords):
    """Files of answers."""

    format = "topk-jsonl"
    wanted = (*_TOKENS, "prompt_logprobs", "logprobs", "choices")

    def row(self, record: Mapping[str, Any], where: str) -> ForeignRow:
        """An answer as a row."""
        return _row(record, where)


def _row(record: Mapping[str, Any], where: str) -> ForeignRow:
    choices = record.get("choices")
    inner = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    given = {**record, **{name: value for name, value in inner.items() if value is not None}}
    tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)
    if tokens is None:
        raise CorpusError(f"{where} has no token ids: none of {', '.join(_TOKENS)} (vLLM gives them on request)")
    ids = integers(tokens, where, "token ids")
    lists = given.get("prompt_logprobs")
    if lists is None and isinstance(given.get("logprobs"), dict):
        lists = given["logprobs"].get("top_logprobs")
    if not isinstance(lists, list) or len(lists) != len(ids):
        raise CorpusError(f"{where} has no list of log-probabilities for each of its {len(ids)} tokens")
    named, found = [], []
    for position, entries in enumerate(lists):
        if entries and position:
            named.append(position)
            found.append(_Answer(entries, int(ids[position]), where))
    fewest = min((len(each.entries) for each in found), default=1)
    chosen = [each.top(fewest) for each in found]
    labels = [each.own for each in found]
    return listed_row(
        ids, named, [list(each) for each in chosen], [list(each.values()) for each in chosen], where,
        None if None in labels else np.array(labels, np.float64),
    )  # fmt: skip


class _Answer:
    """The entries of one position: log-probabilities by token id.

    Attributes:
        entries: all of them.
        own: that of the token that stands there; None if it is not among them.
    """

    def __init__(self, entries: Any, token: int, where: str) -> None:
        if not isinstance(entries, Mapping):
            raise CorpusError(f"{where} has a list of log-probabilities that names no tokens")
        try:
            named = {token_number(name): value for name, value in entries.items()}
        except ValueError:
            raise CorpusError(
                f"{where} names tokens by their text; ask the server for token ids (return_tokens_as_token_ids)"
            ) from None
        ranks = {id_: value["rank"] for id_, value in named.items() if isinstance(value, dict) and value.get("rank")}
        plain = {i: value.get("logprob") if isinstance(value, dict) else value for i, value in named.items()}
        if any(type(value) not in (int, float) for value in plain.values()):
            raise CorpusError(f"{where} has a log-probability that is no number")
        self.entries: dict[int, float] = {i: float(value or 0) for i, value in plain.items()}
        self.own: float | None = self.entries.get(token)
        self._token, self._rank, self._ranked = token, ranks.get(token), bool(ranks)

    def top(self, fewest: int) -> dict[int, float]:
        """The most likely entries, without the token itself where the server added it.

        With ranks, an added token has one above the number of entries, or none. Without them, it is taken for added
        where it is the least likely and other positions of the record have an entry less.
        """
        falling = dict(sorted(self.entries.items(), key=lambda entry: -entry[1]))
        last = next(reversed(falling))
        if self._token != last or len(falling) == 1:
            return falling
        added = (self._rank or 1 << 60) > len(falling) if self._ranked else len(falling) > fewest
        return {i: value for i, value in falling.items() if i != self._token} if added else falling


def write(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write a file of answers; see the module."""
    with NewFile(out) as file:
        for number, pieces in enumerate(pieces_of(cache), 1):
            for piece in pieces:
                file.write(orjson.dumps(_record(piece), option=orjson.OPT_APPEND_NEWLINE))
            on_row(number)
        publish(file, out)


def _record(piece: Piece) -> dict[str, Any]:
    lists: list[dict[str, Any] | None] = [None] * len(piece.tokens)
    for at, slot in enumerate(piece.slots.tolist()):
        count, token = int(piece.count[at]), int(piece.tokens[slot + 1])
        order = np.argsort(-piece.values[at, :count], kind="stable")
        ids, values = piece.ids[at, order].tolist(), piece.values[at, order].tolist()
        entries = {
            str(i): {"logprob": value, "rank": rank} for rank, (i, value) in enumerate(zip(ids, values, strict=True), 1)
        }
        if piece.label_logprob is not None and token not in ids:
            entries[str(token)] = {"logprob": float(piece.label_logprob[at]), "rank": None}
        lists[slot + 1] = entries
    return {"prompt_token_ids": piece.tokens.tolist(), "prompt_logprobs": lists}


def lost(manifest: Manifest) -> list[str]:
    """What JSON lines of a server cannot hold of a cache."""
    return [*table_lost(manifest), "the exact tail, the partitions and the entropy", *sampled_lost(manifest)]
