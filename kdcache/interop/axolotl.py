"""axolotl: the data sets of its knowledge distillation, prepared or raw.

    prepared   input_ids [n], target_token_ids [n][k], target_logprobs [n][k], target_mask [n][k] (0 where there is
               none), and labels; as `axolotl preprocess` saves them
    raw        input_ids [n], and logprobs: for each of its last tokens a list of entries, such as
               {"token": "token_id:7", "logprob": -0.1}

List t is the distribution that token t was taken from: the target of slot t - 1; axolotl shifts it in its trainer.
`axolotl preprocess` renormalises over k, so a prepared data set has no tail any more: `kdcache audit` says so. A raw
record of `messages` has no token ids: let axolotl prepare it.

Source: axolotl-ai-cloud/axolotl, `src/axolotl/integrations/kd/chat_template.py`, `collator.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorpusError
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import ForeignCache
from kdcache.interop.records import Records, integers, ragged

_PREPARED = ("target_token_ids", "target_logprobs", "target_mask")
_RAW = ("logprobs", "llm_text_generation_vllm_logprobs")
_COLUMNS = ("input_ids", "labels", *_PREPARED, *_RAW)
_PREFIX = "token_id:"


class AxolotlCache(ForeignCache):
    """A data set with log-probabilities. A part is about a megabyte of it."""

    format = "axolotl"

    def __init__(self, path: str, tokens: str | None = None) -> None:  # noqa: ARG002 - it has its own
        self._records = Records(path, _COLUMNS)
        names = self._records.columns
        if "input_ids" not in names:
            raise CorpusError(
                f"{path} has no input_ids but {', '.join(names)[:80]}; let `axolotl preprocess` prepare it first"
            )
        if not {"target_token_ids", "target_logprobs"} <= set(names) and not set(_RAW) & set(names):
            raise CorpusError(f"{path} has neither target_token_ids with target_logprobs nor logprobs")

    def parts(self) -> Sequence[Any]:
        """Parts of files."""
        return self._records.parts()

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The records of a part."""
        for where, record in self._records.read(part):
            yield _row(record, where)


def _row(record: Mapping[str, Any], where: str) -> ForeignRow:
    tokens = integers(record.get("input_ids"), where, "input_ids")
    prepared = record.get("target_token_ids") is not None
    ids, values = _prepared(record, len(tokens), where) if prepared else _raw(record, where)
    first = len(tokens) - len(ids)  # of the token that the first list is of
    if first < 0:
        raise CorpusError(f"{where} has {len(ids)} lists of log-probabilities for {len(tokens)} tokens")
    kept = [at for at, each in enumerate(ids) if each and first + at > 0]
    entry_ids, entry_values, count = ragged([ids[at] for at in kept], [values[at] for at in kept], where)
    slots = np.array([first + at - 1 for at in kept], np.int64)
    return ForeignRow(tokens=tokens, slots=slots, ids=entry_ids, values=entry_values, count=count, where=where)


def _prepared(record: Mapping[str, Any], tokens: int, where: str) -> tuple[list[list[int]], list[list[float]]]:
    """Entries of each token of a prepared record, without those that its mask leaves out."""
    lists, mask = (
        [record[name] for name in _PREPARED[:2] if isinstance(record.get(name), list)],
        record.get(_PREPARED[2]),
    )
    if len(lists) != 2 or any(len(each) != tokens for each in lists):
        raise CorpusError(f"{where} has no list of entries for each of its {tokens} tokens")
    ids, values = [], []
    for at in range(tokens):
        row, logprobs = lists[0][at], lists[1][at]
        there = mask[at] if isinstance(mask, list) and at < len(mask) else [1] * len(row)
        used = [
            bool(flag) and value is not None and value > -1e8
            for flag, value in zip(there, logprobs, strict=False)
        ]  # fmt: skip
        ids.append([i for i, use in zip(row, used, strict=False) if use])
        values.append([value for value, use in zip(logprobs, used, strict=False) if use])
    return ids, values


def _raw(record: Mapping[str, Any], where: str) -> tuple[list[list[int]], list[list[float]]]:
    """Entries of the last tokens of a raw record."""
    lists = next((record[name] for name in _RAW if record.get(name) is not None), None)
    if not isinstance(lists, list):
        raise CorpusError(f"{where} has no {_RAW[0]}")
    ids, values = [], []
    for each in lists:
        try:
            entries = {int(str(entry["token"]).removeprefix(_PREFIX)): float(entry["logprob"]) for entry in each or ()}
        except (KeyError, TypeError, ValueError):
            raise CorpusError(f'{where} has an entry other than {{"token": "token_id:7", "logprob": -0.1}}') from None
        ids.append(list(entries))
        values.append(list(entries.values()))
    return ids, values
