"""Inputs: everything that a shard is a function of, opened, checked and fingerprinted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdcache
from kdcache.corpus.shards import ShardRows, docs_per_shard, shard_rows
from kdcache.corpus.sources import Corpus, Filters, open_corpus
from kdcache.errors import ConfigError, CorpusError
from kdcache.pretrained import (
    context_length,
    fingerprint,
    load_tokenizer,
    model_folder,
    read_config,
    tokenizer_fingerprint,
    vocabulary_size,
)
from kdcache.rows import IGNORE
from kdcache.store.manifest import Manifest
from kdcache.teacher.config import DumpConfig


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a shard is a function of, opened and fingerprinted."""

    folder: Path
    tokenizer: Any
    corpus: Corpus
    manifest: Manifest

    def require_positions(self) -> None:
        """Refuse a corpus in which no position would carry a target, before a teacher is loaded.

        Raises:
            CorpusError: there is none.
        """
        manifest, step = self.manifest, 64
        for start in range(0, manifest.documents, step):
            made = shard_rows(self.corpus, start, start + step, self.tokenizer, manifest.vocab_size, manifest.seq_len)
            if any((row.labels(manifest.seq_len) != IGNORE).any() for row in made.rows):
                return
        raise CorpusError(f"none of the {manifest.documents} documents has a token to predict")

    def shard_rows(self, shard: int) -> ShardRows:
        """The packed rows of one shard."""
        manifest, start = self.manifest, shard * self.manifest.docs_per_shard
        stop = start + manifest.docs_per_shard
        return shard_rows(self.corpus, start, stop, self.tokenizer, manifest.vocab_size, manifest.seq_len)


def open_inputs(config: DumpConfig) -> Inputs:
    """Open what the options name, and refuse what can be refused before a teacher is loaded.

    Raises:
        KdcacheError: see the exception tree.
    """
    rule = config.rule
    filters = Filters(min_chars=config.min_chars, drop=config.drop, limit_docs=config.limit_docs)
    folder = model_folder(config.teacher, "teacher")
    tokenizer = load_tokenizer(folder)
    vocab_size = vocabulary_size(tokenizer)
    rule.width(vocab_size)
    longest = context_length(read_config(folder))
    if longest is not None and config.seq_len > longest:
        raise ConfigError(
            f"--seq-len is {config.seq_len}, above the {longest} positions of the teacher {config.teacher}"
        )
    corpus = open_corpus(
        config.corpus, split=config.split, split_text=config.split_text, text_column=config.text_column,
        messages_column=config.messages_column, filters=filters,
    )  # fmt: skip
    corpus_sha256, size = corpus.survey()
    manifest = Manifest(
        teacher_sha256=fingerprint(folder),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        tokenizer_files={},
        corpus_sha256=corpus_sha256,
        filters=dataclasses.asdict(filters),
        documents=len(corpus),
        docs_per_shard=config.docs_per_shard or docs_per_shard(len(corpus), size),
        vocab_size=vocab_size,
        seq_len=config.seq_len,
        isolate=config.isolate,
        selection=rule.to_fields(),
        known=rule.known(config.stored_temperatures),
        positions=config.positions,
        seed=0 if rule.random_shape is None else config.seed,
        temperatures=config.stored_temperatures,
        precision=config.precision or rule.precision,
        error_bound={},
        id_order=(),
        store=config.store,
        origin={
            "kdcache": kdcache.__version__,
            "teacher": config.teacher,
            "corpus": config.corpus,
            "split": config.split,
            "form": corpus.form,
            "columns": list(corpus.columns),
            "split_text": config.split_text,
        },
    )
    manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    return Inputs(folder=folder, tokenizer=tokenizer, corpus=corpus, manifest=manifest)
