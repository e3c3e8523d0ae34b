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

from collections.abc import Mapping
from typing import Any

from kdcache.errors import CorpusError
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.listed_records import ListedRecords, listed_row, token_number
from kdcache.interop.records import integers

_PREPARED = ("target_token_ids", "target_logprobs", "target_mask")
_RAW = ("logprobs", "llm_text_generation_vllm_logprobs")
_COLUMNS = ("input_ids", "labels", *_PREPARED, *_RAW)


class AxolotlCache(ListedRecords):
    """A data set with log-probabilities."""

    format = "axolotl"
    wanted = _COLUMNS

    def __init__(self, path: str, tokens: str | None = None) -> None:
        super().__init__(path, tokens)
        names = self.columns
        if "input_ids" not in names:
            raise CorpusError(
                f"{path} has no input_ids but {', '.join(names)[:80]}; let `axolotl preprocess` prepare it first"
            )
        if not {"target_token_ids", "target_logprobs"} <= set(names) and not set(_RAW) & set(names):
            raise CorpusError(f"{path} has neither target_token_ids with target_logprobs nor logprobs")

    def row(self, record: Mapping[str, Any], where: str) -> ForeignRow:
        """A record as a row."""
        tokens = integers(record.get("input_ids"), where, "input_ids")
        prepared = record.get("target_token_ids") is not None
        ids, values = _prepared(record, len(tokens), where) if prepared else _raw(record, where)
        first = len(tokens) - len(ids)  # of the token that the first list is of
        if first < 0:
            raise CorpusError(f"{where} has {len(ids)} lists of log-probabilities for {len(tokens)} tokens")
        kept = [at for at, each in enumerate(ids) if each and first + at > 0]
        named = [first + at for at in kept]
        return listed_row(tokens, named, [ids[at] for at in kept], [values[at] for at in kept], where)


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
            entries = {token_number(entry["token"]): float(entry["logprob"]) for entry in each or ()}
        except (KeyError, TypeError, ValueError):
            raise CorpusError(f'{where} has an entry other than {{"token": "token_id:7", "logprob": -0.1}}') from None
        ids.append(list(entries))
        values.append(list(entries.values()))
    return ids, values
