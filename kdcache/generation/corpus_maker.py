"""What makes the shards of one corpus, in any order, each one file: its prompts and its writer.

Everything that can be refused is refused before the model is opened, and the folder is made after that. A shard is
written whole or not at all; if two processes make one, the first file stays, and the second would have been the same.
Within a shard, prompts of about the same length are written behind together: the batches are a function of the shard.

A record of a file is a document of token ids, which a dump reads as it is:

    input_ids         prompt and completion, as the writer read and wrote them
    completion_mask   1 where a token was written, and is a target
    writer_logp       log-probability of each token that was written, in the distribution it was drawn from; else null
    model_logp        the same in the model's own distribution, at T = 1
    prompt, completion   the same as text, for people and for readers with another tokenizer
    document, sample, ended   the number of the prompt and of the completion, and whether a stop token ended it
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

import kdcache
from kdcache import stopping
from kdcache.errors import ConfigError, CorpusError
from kdcache.generated_corpus import GeneratedCorpus, find_generated
from kdcache.generation.options import GenerateConfig
from kdcache.generation.prompts import Prompt, open_prompts
from kdcache.generation.writer import Completion, Writer
from kdcache.pretrained import (
    context_length,
    fingerprint,
    load_tokenizer,
    model_folder,
    read_config,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    vocabulary_size,
)
from kdcache.store.manifest import today
from kdcache.store.open_storage import open_storage
from kdcache.store.sealed_json import canonical


class CorpusMaker:
    """Makes shards of one corpus, in any order.

    Attributes:
        record: of the corpus.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """

    def __init__(self, options: GenerateConfig) -> None:
        self._options, self._storage = options, open_storage(options.out)
        self._folder = model_folder(options.writer, "writer")
        self._tokenizer = load_tokenizer(self._folder, options.chat_template)
        self._vocab_size = vocabulary_size(self._tokenizer)
        context = context_length(read_config(self._folder))
        self._most = None if context is None else context - options.max_new_tokens
        if self._most is not None and self._most < 1:
            raise ConfigError(
                f"max_new_tokens is {options.max_new_tokens}, but the writer {options.writer} was made for {context} "
                "positions"
            )
        vocabulary = vocabulary_fingerprint(self._tokenizer)
        _require_vocabulary(options, vocabulary)
        existing = GeneratedCorpus.read(self._storage)
        date = existing.date if existing else today()
        self._prompts = open_prompts(options, self._tokenizer, self._vocab_size, date)
        stop_tokens = find_stop_tokens(options, self._folder, self._tokenizer, self._vocab_size)
        self.record = GeneratedCorpus(
            writer_sha256=fingerprint(self._folder),
            vocabulary_sha256=vocabulary,
            prompts_sha256=_sha256(self._prompts.sha256, tokenizer_fingerprint(self._tokenizer), vars(options.filters)),
            settings={
                "temperature": options.temperature, "top_p": options.top_p, "max_new_tokens": options.max_new_tokens,
                "stop_tokens": stop_tokens, "seed": options.seed, "samples": options.samples or 1,
                "docs_per_shard": options.docs_per_shard, "batch_rows": options.batch_rows, "dtype": options.dtype,
            },
            documents=self._prompts.documents, shards=self._prompts.shards, date=date,
            origin={"writer": options.writer, "prompts": options.prompts, "kdcache": kdcache.__version__},
        )  # fmt: skip
        if existing is None:
            self._prompts.require_any(self._most)
            self.record.require_free(self._storage)
        else:
            existing.require_same(self.record, self._storage)
            self.record = existing
        self._writer: Writer | None = None

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return self.record.missing(self._storage)

    def completions_of(self, shard: int) -> int:
        """Completions of a shard, if none of its prompts is left out."""
        per_shard = self._options.docs_per_shard
        return min(per_shard, self.record.documents - shard * per_shard) * self._samples

    def create(self) -> None:
        """Open the model, and make the corpus unless it exists."""
        if self._writer is None:
            options, stop_tokens = self._options, self.record.settings["stop_tokens"]
            padding = options.batch_rows > 1 and not (options.free and len(options.start) < 2)
            self._writer = Writer(self._folder, options, self._vocab_size, stop_tokens, padding=padding)
            origin = {**self.record.origin, "compute": self._writer.describe()}
            asked = self.record.date
            self.record = dataclasses.replace(self.record, origin=origin).create(self._storage)
            if self.record.date != asked:  # another process made the record, before midnight
                self._prompts = open_prompts(options, self._tokenizer, self._vocab_size, self.record.date)
            if not self._storage.remote:
                self._storage.sweep({})

    def describe(self) -> dict[str, Any]:
        """What there is of the corpus: `corpus`, `complete`, `shards`, `documents`, `writer` and `writer_sha256`."""
        missing, record = self.missing(), self.record
        return {
            "corpus": self._options.out,
            "complete": not missing,
            "shards": {"planned": record.shards, "written": record.shards - len(missing)},
            "documents": record.documents,
            "writer": self._options.writer,
            "writer_sha256": record.writer_sha256,
        }

    def make(self, shard: int, on_progress: Callable[[float, int], None]) -> tuple[bool, Counter[str]]:
        """Make the file of one shard.

        Args:
            shard: its number.
            on_progress: called with completions done in this shard, a share of those under way included, and tokens.

        Returns:
            Whether it is ours, as another process may have been quicker; and the numbers of `completions`, of `tokens`,
            of completions that were `ended` by a stop token, and of prompts left out, as `dropped.REASON`.

        Raises:
            KdcacheError: see the exception tree; there is no file then.
            Stopped: a signal came; the file is there if that took no longer than the grace time.
        """
        self.create()
        assert self._writer is not None
        with stopping.deferred():
            prompts, dropped = self._prompts.of_shard(shard)
            usable = [prompt for prompt in prompts if self._most is None or len(prompt.ids) <= self._most]
            if len(usable) < len(prompts):
                dropped["too-long"] += (len(prompts) - len(usable)) // self._samples
            written = self._write(usable, on_progress)
            lines = b"".join(self._line(prompt, completion) for prompt, completion in written)
            created = self._storage.create(self.record.file(shard), lines)
        counts = Counter({f"dropped.{reason}": count for reason, count in dropped.items()})
        for _, completion in written:
            counts.update(completions=1, tokens=len(completion.tokens), ended=completion.ended)
        return created, counts

    @property
    def _samples(self) -> int:
        """Completions of a document."""
        return 1 if self._options.free else self._options.samples or 1

    def _write(
        self, prompts: Sequence[Prompt], on_progress: Callable[[float, int], None]
    ) -> list[tuple[Prompt, Completion]]:
        """What is written behind each prompt, in order."""
        assert self._writer is not None
        options, tokens = self._options, 0
        found: dict[int, Completion] = {}
        for batch in _batches(prompts, options.batch_rows):

            def show(step: int, batch: Sequence[int] = batch, tokens: int = tokens) -> None:
                on_progress(len(found) + len(batch) * step / options.max_new_tokens, tokens + len(batch) * step)
                stopping.check(options.grace)

            completions = self._writer.write([prompts[index] for index in batch], show)
            found.update(zip(batch, completions, strict=True))
            tokens += sum(len(completion.tokens) for completion in completions)
            on_progress(len(found), tokens)
        return [(prompt, found[index]) for index, prompt in enumerate(prompts)]

    def _line(self, prompt: Prompt, completion: Completion) -> bytes:
        """The record of a completion, as a line of JSON."""
        before, ids, tokens = [None] * len(prompt.ids), prompt.ids.tolist(), completion.tokens.tolist()
        record = {
            "input_ids": ids + tokens,
            "completion_mask": [0] * len(ids) + [1] * len(tokens),
            "writer_logp": before + completion.logp.tolist(),
            "model_logp": before + completion.model_logp.tolist(),
            **self._texts(ids, tokens[:-1] if completion.ended else tokens),
            "document": prompt.document,
            "sample": prompt.sample,
            "ended": completion.ended,
        }
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)

    def _texts(self, ids: list[int], written: list[int]) -> dict[str, str]:
        """The text of a prompt and of what was written behind it; together that of all tokens, where they can be told
        apart: a character may lie in tokens of both."""
        prompt, whole, alone = (
            str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            for tokens in (ids, ids + written, written)
        )
        return {"prompt": prompt, "completion": whole[len(prompt) :] if whole.startswith(prompt) else alone}


def find_stop_tokens(options: GenerateConfig, folder: Path, tokenizer: Any, vocab_size: int) -> list[int]:
    """The ids that end a completion, sorted: those that are named, else those of the writer's files.

    These are the `eos_token_id` of `generation_config.json` (of `config.json` where there is none), and the tokenizer's
    end of sequence.

    Raises:
        ConfigError: a name that is no token.
    """
    if options.stop:
        vocabulary = tokenizer.get_vocab()
        for text in options.stop:
            if text not in vocabulary:
                raise ConfigError(f"stop is {text!r}, which is not a token of the writer {options.writer}")
        return sorted({int(vocabulary[text]) for text in options.stop})
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except Exception:  # there is no such file, or it is not one
        named = read_config(folder).get("eos_token_id")
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({int(token) for token in ids if token is not None and 0 <= token < vocab_size})


def _require_vocabulary(options: GenerateConfig, vocabulary: str) -> None:
    """Refuse prompts that are token ids of another vocabulary.

    Raises:
        CorpusError: a writer of another vocabulary wrote them.
    """
    found = None if options.free else find_generated(options.prompts)
    if found is not None and found.vocabulary_sha256 != vocabulary:
        raise CorpusError(
            f"the prompts {options.prompts} hold token ids of {found.origin.get('writer')}, whose vocabulary is not "
            f"that of the writer {options.writer}"
        )


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of prompts, so many at a time; those of one length stand together."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _sha256(*parts: Any) -> str:
    return hashlib.sha256(canonical(list(parts))).hexdigest()
