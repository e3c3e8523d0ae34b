"""Check data: what a corpus becomes with a teacher's tokenizer and template, without running the teacher.

It does what a dump does to documents, by the same code: the same are left out, for the same reasons.
Cost: reading and tokenising the corpus once; memory for the tokens of one shard, and 8 bytes a document.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from kdcache.advice import of_data
from kdcache.corpus.packing import Tokens
from kdcache.corpus.shards import ShardReading
from kdcache.corpus.survey import shard_rule, survey
from kdcache.rows import IGNORE
from kdcache.store.manifest import today
from kdcache.teacher.config import CheckOptions
from kdcache.teacher.inputs import find_writer, open_tokenizer, require_no_bad_record, shaping_of

_QUANTILES = {"least": 0.0, "median": 0.5, "0.9": 0.9, "0.99": 0.99, "most": 1.0}
_MOST_LISTED = 1000


def check_data(options: CheckOptions, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read a corpus as a dump would.

    Args:
        options: which corpus, and what becomes of it.
        on_progress: called with documents done and documents to do.

    Returns:
        `form` and `columns` of the corpus; `documents`; `forms` of those tokenised; `dropped` by reason; `bad`
        records, and the first 1,000 of them as `bad_records`; `cut` and `truncated` documents; `rows`; `tokens`;
        `labels` that carry a target, and `eos_labels` among them, None without an end-of-sequence token;
        `supervised_share`, labels by tokens; `lengths` of documents in tokens; `teacher_context`, what the manifest
        would say of what the teacher alone reads; `examples`, each with its `document`, `parts` of `text` that are
        `supervised` or not, and its `teacher`: the `text` that this reads before the document, and the beginning of the
        document that it `replaces`, None where the teacher reads what its student does; and `advice`, see
        `kdcache.advice`.

    Raises:
        KdcacheError: the corpus or the tokenizer cannot be used.
    """
    files, tokenizer, vocab_size = open_tokenizer(options)
    corpus = options.open(options.corpus)
    find_writer(options, corpus, tokenizer)
    plan = survey(corpus, shard_rule(corpus)).plan
    context = options.teacher_context(corpus.form.tells_teacher, files.context)
    shaping = shaping_of(options, tokenizer, vocab_size, today(), context)
    reading = ShardReading(corpus, shaping.tokeniser)
    packed_out: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    examples: list[Tokens] = []
    sizes = array("q")
    for shard in range(len(plan)):
        tokens = [one for batch in reading.shard(plan, shard) for one in batch]
        if options.on_bad_record == "stop":
            require_no_bad_record(reading)
        examples += tokens[: options.examples - len(examples)]
        lengths: Counter[int] = Counter()
        for one in tokens:
            lengths[one.document] += len(one.ids)
        sizes.extend(lengths.values())
        packed = shaping.packed(tokens)
        packed_out.update(packed.dropped)
        counts.update(cut=packed.cut, truncated=packed.truncated, rows=len(packed.rows))
        for row in packed.rows:
            labels = row.labels(len(row.tokens))
            counts.update(tokens=len(row.tokens), labels=int((labels != IGNORE).sum()))
            counts.update(eos_labels=int((labels == tokenizer.eos_token_id).sum()))
        if on_progress:
            on_progress(int(plan.last[shard]) + 1, plan.documents)
    dropped = reading.dropped + packed_out
    found: dict[str, Any] = {
        "corpus": options.corpus,
        "form": corpus.form.name,
        "columns": list(corpus.form.columns.values()),
        "documents": plan.documents,
        "forms": dict(reading.forms),
        "dropped": dict(sorted(dropped.items())),
        "bad": len(reading.bad_records),
        "bad_records": [vars(bad) for bad in reading.bad_records[:_MOST_LISTED]],
        "cut": counts["cut"],
        "truncated": counts["truncated"],
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "labels": counts["labels"],
        "eos_labels": None if tokenizer.eos_token_id is None else counts["eos_labels"],
        "supervised_share": counts["labels"] / counts["tokens"] if counts["tokens"] else 0.0,
        "lengths": _quantiles(sizes),
        "teacher_context": context or None,
        "examples": [
            {"document": one.document, "parts": _parts(tokenizer, one), "teacher": _teacher(tokenizer, one)}
            for one in examples
        ],
    }
    return {**found, "advice": of_data(found)}


def _teacher(tokenizer: Any, tokens: Tokens) -> dict[str, Any] | None:
    """What the teacher reads before a document, and in place of which text of it."""
    if tokens.prefix is None or not tokens.prefix.content:
        return None
    return {
        name: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for name, ids in (("text", tokens.prefix.tokens), ("replaces", tokens.ids[: tokens.prefix.replaced]))
    }


def _quantiles(sizes: array[int]) -> dict[str, int]:
    if not sizes:
        return {}
    return {name: int(np.quantile(sizes, level, method="lower")) for name, level in _QUANTILES.items()}


def _parts(tokenizer: Any, tokens: Tokens) -> list[dict[str, Any]]:
    """A document as text, divided where supervision begins or ends."""
    supervised = np.ones(len(tokens.ids), bool) if tokens.supervised is None else tokens.supervised
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(tokens.ids)]
    found, shown = [], ""
    for start, stop in itertools.pairwise(edges):
        text = tokenizer.decode(tokens.ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if stop > start:
            found.append({"text": text[len(shown) :], "supervised": bool(supervised[start])})
        shown = text
    return found
