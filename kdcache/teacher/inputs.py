"""Inputs: everything that a shard is a function of, opened, checked and fingerprinted.

Who creates a cache surveys the corpus and plans its shards. Who adds to one reads the plan that is there, so its start
costs nothing that grows with the corpus; the documents of a shard are checked when the shard is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdcache
from kdcache.corpus.plan import Plan
from kdcache.corpus.shards import Shaping, ShardReading, ShardRows, has_label, shard_rows
from kdcache.corpus.sources import Corpus
from kdcache.corpus.survey import shard_rule, survey
from kdcache.corpus.tokenise import Tokeniser
from kdcache.errors import CacheMismatchError, ConfigError, CorpusError
from kdcache.extras import WRITER_LOGP, ExtraSpec
from kdcache.generated_corpus import GeneratedCorpus, find_generated
from kdcache.known import Known
from kdcache.pretrained import (
    count_parameters,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    vocabulary_size,
)
from kdcache.store.manifest import NAME, Manifest, today
from kdcache.store.plan import read_plan
from kdcache.store.storage import Storage
from kdcache.teacher.config import CorpusOptions, DumpConfig
from kdcache.teacher.engines.base import TeacherFiles, find_engine, require_extras

Planned = tuple[Plan, str, str]
"""A plan, the fingerprint of its corpus, and the day on which it was made."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a shard is a function of.

    Attributes:
        folder: of the teacher.
        tokenizer: the teacher's.
        corpus: the documents.
        plan: which of them each shard holds.
        shaping: how they become rows.
        manifest: of the cache that these make.
    """

    folder: Path
    tokenizer: Any
    corpus: Corpus
    plan: Plan
    shaping: Shaping
    manifest: Manifest

    def shard_rows(self, shard: int) -> ShardRows:
        """The packed rows of one shard.

        Raises:
            CorpusError: its documents are not those that were planned.
        """
        return shard_rows(self.corpus, self.plan, shard, self.shaping)

    @property
    def planned(self) -> Planned:
        """What another process needs to open the same inputs without a survey."""
        return self.plan, self.manifest.corpus_sha256, self.manifest.date

    def with_known(self, known: Known) -> Inputs:
        """The same, for targets that know this."""
        manifest = dataclasses.replace(self.manifest, known=known)
        return dataclasses.replace(self, manifest=dataclasses.replace(manifest, error_bound=manifest.codec.error_bound))


def _extras(config: DumpConfig, folder: Path, corpus: Corpus) -> dict[str, Any]:
    """The extra arrays that are asked for, and those that the corpus brings, as a manifest names them.

    Raises:
        ConfigError: the engine does not offer one; or there is one of the corpus, and rows would be copied.
    """
    widths = require_extras(find_engine(config.engine), folder, config.extra)
    specs = {name: ExtraSpec(width=width, precision=config.extra_precision) for name, width in widths.items()}
    if WRITER_LOGP in corpus.form.optional:
        if config.reuse:
            raise ConfigError(f"reuse copies what other caches hold, but {config.corpus} brings its own {WRITER_LOGP}")
        specs[WRITER_LOGP] = ExtraSpec(width=1)
    return {name: specs[name].to_fields() for name in sorted(specs)}


def open_inputs(
    config: DumpConfig, storage: Storage | None = None, planned: Planned | None = None, date: str | None = None
) -> Inputs:
    """Open what the options name, and refuse what can be refused before a teacher is loaded.

    Args:
        config: the options.
        storage: where the cache is, or will be; its plan is taken if there is one. None to plan anew.
        planned: a plan that another process has made or found.
        date: the day that templates see in a cache that is planned anew; None for today.

    Raises:
        KdcacheError: see the exception tree.
    """
    rule = config.rule
    files, tokenizer, vocab_size = open_tokenizer(config)
    rule.width(vocab_size)
    corpus = config.open(config.corpus)
    generated = find_writer(config, corpus, tokenizer)
    asked = shard_rule(corpus, config.docs_per_shard, config.chars_per_shard)
    existing = planned or (_existing_plan(storage, corpus, asked) if storage else None)
    date = existing[2] if existing else date or today()
    context = config.teacher_context(corpus.form.tells_teacher, files.context)
    shaping = shaping_of(config, tokenizer, vocab_size, date, context)
    plan, corpus_sha256, _ = existing or (*_survey(corpus, asked, shaping, config.on_bad_record), date)
    manifest = Manifest(
        teacher_sha256=files.sha256(),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        tokenizer_files={},
        corpus_sha256=corpus_sha256,
        filters=dataclasses.asdict(corpus.filters),
        documents=plan.documents,
        shards=len(plan),
        plan={},
        date=date,
        on_bad_record=config.on_bad_record,
        eos=config.eos,
        pack=config.pack,
        overlong=config.overlong,
        vocab_size=vocab_size,
        seq_len=config.seq_len,
        isolate=config.isolate or config.pack == "none",  # a row of one piece has nothing to isolate
        selection=rule.to_fields(),
        known=find_engine(config.engine).knows.known(rule, config.stored_temperatures),
        positions=config.positions,
        seed=0 if rule.random_shape is None else config.seed,
        temperatures=config.stored_temperatures,
        precision=config.precision or rule.precision,
        error_bound={},
        id_order=(),
        store=config.store,
        extras=_extras(config, files.folder, corpus),
        origin={
            "kdcache": kdcache.__version__,
            "teacher": config.teacher,
            "corpus": config.corpus,
            "split": config.split,
            "form": corpus.form.name,
            "columns": list(corpus.form.columns.values()),
            "split_text": config.split_text,
            **({"teacher_parameters": parameters} if (parameters := count_parameters(files.folder)) else {}),
            **({"generated": generated.described} if generated else {}),
        },
        teacher_context=context,
    )
    manifest.require_teacher_context()
    manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    return Inputs(
        folder=files.folder, tokenizer=tokenizer, corpus=corpus, plan=plan, shaping=shaping, manifest=manifest
    )


def open_tokenizer(config: CorpusOptions) -> tuple[TeacherFiles, Any, int]:
    """The teacher's files, its tokenizer, and the vocabulary of that.

    Raises:
        ModelError: there is no such teacher, or its tokenizer cannot be used.
        ConfigError: rows are longer than what the teacher was made for.
    """
    files = find_engine(config.teacher_spec.engine).teacher_files(config.teacher_spec)
    tokenizer = load_tokenizer(files.folder, config.chat_template)
    longest = files.context
    for name in ("seq_len", "teacher_seq_len"):
        asked = getattr(config, name)
        if longest is not None and asked is not None and asked > longest:
            raise ConfigError(f"{name} is {asked}, above the {longest} positions of the teacher {config.teacher}")
    return files, tokenizer, vocabulary_size(tokenizer)


def find_writer(config: CorpusOptions, corpus: Corpus, tokenizer: Any) -> GeneratedCorpus | None:
    """Who wrote a corpus of token ids, if `kdcache generate` did.

    Raises:
        CorpusError: it is not all written, or its ids are not those of the teacher's vocabulary.
    """
    if corpus.form.name != "tokenised":
        return None
    found = find_generated(config.corpus)
    if found is not None and found.vocabulary_sha256 != vocabulary_fingerprint(tokenizer):
        raise CorpusError(
            f"the corpus {config.corpus} holds token ids of {found.origin.get('writer')}, whose vocabulary is not that "
            f"of the teacher {config.teacher}; with ignore_columns input_ids,completion_mask its texts are read instead"
        )
    return found


def shaping_of(
    config: CorpusOptions, tokenizer: Any, vocab_size: int, date: str, context: Mapping[str, Any]
) -> Shaping:
    """How the options make rows of documents; `context` is what `CorpusOptions.teacher_context` says."""
    return Shaping(
        tokeniser=Tokeniser(tokenizer, vocab_size, eos=config.eos, date=date, teacher_system=config.teacher_system),
        seq_len=config.seq_len, pack=config.pack, overlong=config.overlong,
        teacher_seq_len=context["seq_len"] if context else 0,
    )  # fmt: skip


def _survey(corpus: Corpus, rule: dict[str, int], shaping: Shaping, on_bad_record: str) -> tuple[Plan, str]:
    """Plan a new cache.

    Raises:
        CorpusError: no document can be used, no position would carry a target, or there is a bad record and
            `on_bad_record` is `stop`.
    """
    found = survey(corpus, rule)
    if on_bad_record == "stop":
        reading = ShardReading(corpus, shaping.tokeniser)
        for shard in range(len(found.plan)):
            for _ in reading.shard(found.plan, shard):
                require_no_bad_record(reading)
    labelled, reading = has_label(corpus, found.plan, shaping)
    if not labelled:
        raise CorpusError(f"none of the {found.plan.documents} documents has a token to predict{reading.left_out()}")
    return found.plan, found.corpus_sha256


def require_no_bad_record(reading: ShardReading) -> None:
    """Refuse a corpus in which a record was found that cannot be used.

    Raises:
        CorpusError: naming the first.
    """
    for first in reading.bad_records[:1]:
        raise CorpusError(
            f"document {first.document} cannot be used: {first.reason}; with on_bad_record skip it is left out and "
            "counted"
        )


def _existing_plan(storage: Storage, corpus: Corpus, rule: dict[str, int]) -> Planned | None:
    """The plan of the cache that is there.

    Raises:
        CorpusError: the corpus has other files, or is read in another way.
        CacheMismatchError: the cache was not made from a corpus, or its shards end elsewhere.
    """
    if storage.size(NAME) is None:
        return None
    manifest = Manifest.read(storage)
    plan = read_plan(storage, manifest)
    if plan is None:
        raise CacheMismatchError(f"{storage} holds a cache that was not made from a corpus; choose another folder")
    plan.require_corpus(corpus.files, corpus.reading, corpus.name)
    if plan.rule != rule:
        mine, theirs = ((f"{name} {value:,}" for name, value in each.items()) for each in (plan.rule, rule))
        raise CacheMismatchError(
            f"{storage} holds a cache of another configuration; its shards have {next(mine)}, not {next(theirs)}"
        )
    return plan, manifest.corpus_sha256, manifest.date
