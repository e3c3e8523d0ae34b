"""Prompts: what a model is to write behind, as token ids, in shards.

Two sources: the documents of a corpus of any form, each read up to where an answer begins; and nothing but the token
that begins a sequence, or a text of one's own that documents begin with.
Guarantee: the prompts of a shard are a function of the source and the shard's number.
Cost: each process reads the prompts once to find where shards begin; a shard is tokenised when it is made.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kdcache.corpus.documents import BadDocument, Document
from kdcache.corpus.forms import Columns
from kdcache.corpus.open_source import open_source
from kdcache.corpus.packing import Tokens
from kdcache.corpus.shards import ShardReading
from kdcache.corpus.sources import Corpus
from kdcache.corpus.survey import survey
from kdcache.corpus.tokenise import Tokeniser
from kdcache.errors import ConfigError, CorpusError
from kdcache.generation.options import GenerateConfig
from kdcache.rows import Ints
from kdcache.store.sealed_json import canonical


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to write behind, once.

    Attributes:
        document: its number among the prompts.
        sample: the number of this completion of it.
        ids: `[n]` int32, n at least 1.
    """

    document: int
    sample: int
    ids: Ints


class Prompts(Protocol):
    """Prompts in shards.

    Attributes:
        documents: how many there are.
        shards: how many shards.
        sha256: of their content.
    """

    documents: int
    shards: int
    sha256: str

    def of_shard(self, shard: int) -> tuple[list[Prompt], Counter[str]]:
        """The prompts of a shard, in order, and how many documents were left out, by reason.

        Raises:
            CorpusError: the documents are not those that were there at first.
        """

    def require_any(self, most: int | None) -> None:
        """Refuse prompts of which none can be used.

        Args:
            most: tokens that a prompt may have; None where any number will do.

        Raises:
            CorpusError: saying why not.
        """


def open_prompts(options: GenerateConfig, tokenizer: Any, vocab_size: int, date: str) -> Prompts:
    """The prompts that the options name.

    Args:
        options: of the command.
        tokenizer: the writer's.
        vocab_size: its ids lie below it.
        date: the day that a chat template may ask for.

    Raises:
        KdcacheError: they cannot be opened, or a document cannot begin.
    """
    tokeniser = Tokeniser(tokenizer, vocab_size, eos="never", date=date)
    if options.free:
        return Beginnings(_starts(options, tokeniser, tokenizer), options.samples or 1, options.docs_per_shard)
    return CorpusPrompts(_open(options), tokeniser, options.samples or 1, options.docs_per_shard)


class Beginnings:
    """Documents that begin with the same few tokens; see `Prompts`.

    Args:
        starts: token ids that documents begin with, one after the other.
        documents: how many are written.
        per_shard: how many of them are in a shard.
    """

    def __init__(self, starts: Sequence[Ints], documents: int, per_shard: int) -> None:
        self._starts, self._per_shard = starts, per_shard
        self.documents, self.shards = documents, -(-documents // per_shard)
        self.sha256 = hashlib.sha256(canonical([ids.tolist() for ids in starts])).hexdigest()

    def of_shard(self, shard: int) -> tuple[list[Prompt], Counter[str]]:
        """See `Prompts`."""
        first = shard * self._per_shard
        numbers = range(first, min(first + self._per_shard, self.documents))
        return [
            Prompt(document=number, sample=0, ids=self._starts[number % len(self._starts)]) for number in numbers
        ], Counter()

    def require_any(self, most: int | None) -> None:
        """See `Prompts`."""
        longest = max(map(len, self._starts))
        if most is not None and longest > most:
            raise CorpusError(f"start has {longest} tokens, and max_new_tokens leaves room for {most}")


class CorpusPrompts:
    """The documents of a corpus; see `Prompts`.

    Args:
        corpus: of prompts.
        tokeniser: makes tokens of them.
        samples: completions of each.
        per_shard: documents of a shard.
    """

    def __init__(self, corpus: Corpus, tokeniser: Tokeniser, samples: int, per_shard: int) -> None:
        self._corpus, self._tokeniser, self._samples = corpus, _Prompting(tokeniser), samples
        found = survey(corpus, {"docs_per_shard": per_shard})
        self._plan, self.sha256 = found.plan, found.corpus_sha256
        self.documents, self.shards = found.plan.documents, len(found.plan)

    def of_shard(self, shard: int) -> tuple[list[Prompt], Counter[str]]:
        """See `Prompts`."""
        reading = ShardReading(self._corpus, self._tokeniser)
        found = [tokens for batch in reading.shard(self._plan, shard) for tokens in batch]
        prompts = [
            Prompt(document=tokens.document, sample=sample, ids=tokens.ids)
            for tokens in found
            for sample in range(self._samples)
        ]
        return prompts, reading.dropped

    def require_any(self, most: int | None) -> None:
        """See `Prompts`."""
        reading, shortest = ShardReading(self._corpus, self._tokeniser), None
        for shard in range(self.shards):
            for batch in reading.shard(self._plan, shard):
                for tokens in batch:
                    shortest = min(len(tokens.ids), shortest or len(tokens.ids))
                if shortest is not None and (most is None or shortest <= most):
                    return
        name = self._corpus.name
        if shortest is not None:
            raise CorpusError(
                f"the shortest prompt of {name} has {shortest} tokens, and max_new_tokens leaves room for {most}"
            )
        raise CorpusError(f"none of the {self.documents} prompts of {name} can be used{reading.left_out()}")


class _Prompting:
    """Makes of a document the tokens of its prompt; see `DocumentTokeniser`."""

    def __init__(self, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser

    def tokenise(self, documents: Sequence[tuple[int, Document]]) -> list[list[Tokens] | BadDocument]:
        found: list[list[Tokens] | BadDocument] = []
        for number, document in documents:
            try:
                found.append([Tokens(document=number, ids=self._tokeniser.prompt_of(document))])
            except BadDocument as bad:
                found.append(bad)
        return found


def _starts(options: GenerateConfig, tokeniser: Tokeniser, tokenizer: Any) -> Sequence[Ints]:
    if not options.start:
        begin = np.asarray(tokeniser.prompt(""), np.int32)
        if not len(begin) and tokenizer.bos_token_id is not None:
            begin = np.array([tokenizer.bos_token_id], np.int32)
        if not len(begin):
            raise ConfigError(
                f"the tokenizer of {options.writer} has no beginning-of-sequence token to write behind; give a text "
                "that documents begin with as start"
            )
        return [begin]
    starts = [np.asarray(tokeniser.prompt(text), np.int32) for text in options.start]
    for text, ids in zip(options.start, starts, strict=True):
        if not len(ids):
            raise ConfigError(f"start is {text!r}, which has no token")
    return starts


def _open(options: GenerateConfig) -> Corpus:
    """The corpus of prompts. A column `prompt` that stands without completions is one of texts or of messages."""
    columns = options.columns
    if columns == Columns(ignored=columns.ignored) or (columns.prompt and not columns.completion):
        name = columns.prompt or "prompt"
        _, names = open_source(options.prompts, options.split, options.split_text)
        alone = name in names and (columns.prompt or not {"input_ids", "text", "messages", "completion"} & set(names))
        if alone and (columns.completion or "completion") not in names:
            as_text = Columns(text=name, ignored=columns.ignored)
            if not _holds_lists(options, as_text):
                columns = as_text
            else:
                columns = Columns(
                    messages=name, tools=columns.tools, documents=columns.documents, ignored=columns.ignored
                )
    return options.open(options.prompts, columns)


def _holds_lists(options: GenerateConfig, columns: Columns) -> bool:
    """Whether the column that is named as text holds conversations."""
    try:
        corpus = options.open(options.prompts, columns)
    except CorpusError:  # a table says so by its type
        return True
    name = columns.text or ""
    part = next(iter(corpus.parts()), None)
    records = corpus.read(part)[0] if part is not None else []
    first = next((record[name] for record in records if isinstance(record, dict) and record.get(name)), None)
    return isinstance(first, list)
