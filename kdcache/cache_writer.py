"""The public way to write a cache: rows of tokens and targets in; shards, commits and fingerprints out.

For whoever has a teacher of their own (Megatron, JAX, a server). `dump-teacher` writes through it, too.

    writer = create_cache("cache", vocab_size=256, seq_len=512, selection=Selection(k=64), shards=64, teacher="mine-7b")
    for number in writer.missing():
        with writer.shard(number) as shard:
            shard.write(tokens, targets)
    writer.finish()

Guarantee: a reader sees nothing of a shard before its `with` block ends without an error, and all of it after that. A
process that is killed leaves nothing that a reader sees; the same call to `create_cache` continues with the shards that
are missing. Any number of processes on any machines may write at once: if two write the same shard, one commit wins.
Cost: encoding, compression and one write of each row; in memory one row.

Shapes: n tokens of a row, P pieces, N labelled slots of a row, L slots a row.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike

from kdcache.corpus.plan import Plan
from kdcache.errors import ConfigError, TargetError
from kdcache.extras import ExtraSpec
from kdcache.given_rows import given_row
from kdcache.known import Known
from kdcache.prefixes import Prefix
from kdcache.pretrained import load_tokenizer, tokenizer_fingerprint
from kdcache.rows import IGNORE, PackedRow
from kdcache.selection import Selection
from kdcache.selection.target_faults import drop_unknown, find_fault
from kdcache.store import publish
from kdcache.store.commit import Commit, add_histograms, histogram
from kdcache.store.commits import committed
from kdcache.store.manifest import Manifest, today
from kdcache.store.open_storage import open_storage
from kdcache.store.pulse import Pulse
from kdcache.store.row_format import Extras, Record
from kdcache.store.shards import ShardWriter
from kdcache.store.storage import Storage
from kdcache.targets import SparseTargets


def create_cache(
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    seq_len: int,
    selection: Selection,
    shards: int,
    teacher: str,
    corpus: str = "",
    documents: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    temperatures: Sequence[float] = (1.0,),
    known: Known | None = None,
    isolate: bool = True,
    positions: str = "all",
    seed: int = 0,
    store: str = "arrow",
    precision: str | None = None,
    extras: Mapping[str, ExtraSpec] | None = None,
    teacher_seq_len: int | None = None,
    frequent_ids: Sequence[int] = (),
    origin: Mapping[str, Any] | None = None,
) -> CacheWriter:
    """Create a cache, or continue one that was created with the same arguments.

    Args:
        path: folder or URL of the cache.
        vocab_size: token ids lie below it; ids that a model pads beyond it are to be dropped before any softmax.
        seq_len: slots a row, the most tokens that a row may have.
        selection: how the targets' entries were picked.
        shards: units of work and of commit. A shard is best a few megabytes to a gigabyte of targets.
        teacher: says which teacher it is: the sha256 of its weights, or any text that names them without doubt.
            Caches of one teacher, and only those, are to say the same.
        corpus: says in the same way which documents the rows are made of.
        documents: how many those are; a piece names one below it. By default the number of shards.
        tokenizer: folder of a Hugging Face tokenizer, copied into the cache. Without it nothing can be shown as text,
            and a student is saved without a tokenizer; training needs none.
        temperatures: the T whose partition and tail the targets hold, in the targets' order.
        known: what the targets know; by default all that the selection can. Targets of `SparseTargets.from_topk` know
            `Known(entropy=False, tails=(1.0,), tail_sum="remainder")`.
        isolate: whether a teacher's prediction in one piece was made without sight of the row's other pieces.
        positions: which labelled positions carry a target: `all`, or `entropy>X` (the others are dropped when written).
        seed: of the draws of a sampling selection.
        store: `arrow` or `zarr`.
        precision: `float32`, `float16`, or 4 to 16 bits a value; by default the kind's own (6 bits; 8 where
                every token is kept).
        extras: further arrays of each row, by name; every row must then come with all of them.
        teacher_seq_len: where the teacher was told what its student never reads (docs/contexts.md), the most tokens
            that it read for a piece, that included; rows may then come with prefixes.
        frequent_ids: ids by falling frequency among the entries, which makes precisions of some bits a fifth smaller;
            `kdcache.codec.id_ranks.FrequencyOrder` counts them over sample targets.
        origin: names and versions for people, as plain JSON values; caches that differ in nothing else are the same.

    Returns:
        A writer of its shards.

    Raises:
        ConfigError: a setting out of range, or settings that contradict each other.
        CacheMismatchError: there is a cache that was created with other arguments; each difference is named.
        CacheError: other files lie there, or the place cannot be written.
        ModelError: the folder of the tokenizer holds none.
    """
    if shards < 1:
        raise ConfigError(f"shards is {shards}, but must be at least 1")
    if documents is None:
        documents = shards
    if documents < shards:
        raise ConfigError(f"documents is {documents}, fewer than the {shards} shards")
    files, tokenizer_sha256 = _read_tokenizer(tokenizer)
    stored = tuple(float(t) for t in temperatures)
    fields: dict[str, Any] = {
        "teacher_sha256": _fingerprint(teacher),
        "tokenizer_sha256": tokenizer_sha256,
        "tokenizer_files": {},
        "corpus_sha256": _fingerprint(corpus),
        "filters": {},
        "documents": documents,
        "shards": shards,
        "plan": {},
        "date": today(),
        "on_bad_record": "stop",
        "eos": "auto",
        "pack": "best-fit",
        "overlong": "auto",
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "isolate": isolate,
        "selection": selection.to_fields(),
        "known": selection.known(stored) if known is None else known,
        "positions": positions,
        "seed": 0 if selection.random_shape is None else seed,
        "temperatures": stored,
        "precision": precision or selection.precision,
        "id_order": tuple(int(i) for i in frequent_ids),
        "store": store,
        "extras": {name: spec.to_fields() for name, spec in sorted((extras or {}).items())},
        "teacher_context": {} if teacher_seq_len is None else {"seq_len": teacher_seq_len, "system": None},
        "origin": {"teacher": teacher, "corpus": corpus, **(origin or {})},
    }
    manifest = Manifest(**fields, error_bound={})
    manifest.require_sound()
    manifest = Manifest(**fields, error_bound=manifest.codec.error_bound)
    storage = open_storage(path)
    return CacheWriter.create(storage, publish.require_free_or_same(storage, manifest) or manifest, files)


class CacheWriter:
    """Writes the shards of one cache; `create_cache` makes it. It may be sent to other processes.

    While a shard is written, `kdcache status` shows who writes it and how far it is.

    Attributes:
        storage: where the cache is.
        manifest: what the cache is.
        worker: `I/N` if this process is one of several, for `status`.
    """

    def __init__(self, storage: Storage, manifest: Manifest, worker: str = "") -> None:
        self.storage, self.manifest, self.worker = storage, manifest, worker
        self._pulse = Pulse(storage, manifest, worker)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.manifest, self.worker)  # another process has a pulse of its own

    @classmethod
    def create(
        cls,
        storage: Storage,
        manifest: Manifest,
        tokenizer: dict[str, bytes],
        plan: Plan | None = None,
        worker: str = "",
    ) -> Self:
        """The writer of a cache of this manifest, which is created unless it exists.

        Args:
            storage: where the cache is.
            manifest: what it is.
            tokenizer: the content of its tokenizer's files, by name.
            plan: of the shards; None where the rows come from no corpus of kdcache.
            worker: `I/N` if this process is one of several.

        Raises:
            CacheMismatchError: there is a cache of another configuration.
            CacheError: it cannot be written.
        """
        writer = cls(storage, publish.publish_manifest(storage, manifest, tokenizer, plan), worker)
        publish.sweep(storage, writer.manifest)
        return writer

    def missing(self) -> list[int]:
        """The shards that are not committed yet."""
        done = set(committed(self.storage, self.manifest))
        return [shard for shard in range(self.manifest.shards) if shard not in done]

    def is_committed(self, number: int) -> bool:
        """Whether somebody has committed a shard by now; then nothing of it need be made."""
        return Commit.read(self.storage, number, self.manifest.sha256) is not None

    @contextmanager
    def shard(self, number: int) -> Iterator[NewShard]:
        """Write one shard: it is committed when the `with` block ends, and not if an exception ends it.

        Of a shard that somebody else has committed already, or commits meanwhile, what is written here is dropped.

        Args:
            number: of the shard, from 0.

        Raises:
            ConfigError: there is no such shard.
            CacheError: it cannot be written.
        """
        if not 0 <= number < self.manifest.shards:
            raise ConfigError(f"shard is {number}, but the cache has the shards 0 to {self.manifest.shards - 1}")
        if self.is_committed(number):
            yield NewShard(self.manifest, number)
            return
        shard = NewShard(self.manifest, number)
        with (
            self._pulse.of(number, lambda: (shard.rows, shard.planned_rows, shard.labels)),
            publish.new_shard(self.storage, self.manifest, number) as data,
        ):
            shard._data = data
            yield shard
            shard.committed = publish.publish_shard(
                self.storage, self.manifest, data, documents=shard.documents, entropies=shard.entropies,
                compute=shard.compute, dropped_by=shard.dropped_by, bad=len(shard.bad_records),
                bad_records=shard.bad_records, cut=shard.cut, truncated=shard.truncated, eos_labels=shard.eos_labels,
            )  # fmt: skip

    def finish(self, shards: Iterable[int] | None = None) -> dict[str, Any]:
        """Remove what writers that died have left, seal the cache if it is complete, and count.

        Args:
            shards: those to count while the cache is not complete; None for all that are committed, by anyone, which
                reads the commit of each.

        Returns:
            `cache`, `complete`, `shards{planned, committed}`, `rows`, `labels`, `positions`, `entries`, `documents`,
            `dropped{reason: documents}`, `bad`, `bad_records[{document, reason}]` (the first thousand), `cut`,
            `truncated`, `eos_labels`, `bytes`, `bytes_per_position`, `entropy_quantiles`. `complete` and `shards` are
            of the whole cache; the others too, once it is complete.
        """
        return publish.finish(self.storage, shards)


_NO_REASON = "no reason given"


class NewShard:
    """A shard that is being written; `CacheWriter.shard` makes it. One thread at a time may write.

    Attributes:
        number: its number.
        rows, labels: rows, and labelled slots, written so far.
        planned_rows: how many rows there will be, for `status`; None where that is not known.
        documents: how many documents the shard covers; set it if they are not the shard's share of all.
        dropped_by: how many of them became no rows, by reason; `dropped` is their sum, and may be set by who knows no
            reasons.
        bad_records: those among the dropped that could not be used, each as `{"document": 17, "reason": "..."}`; none
            twice. A reason is cut to one line of 200 characters.
        cut, truncated: documents that lie in several rows because they are longer than one, and documents of which only
            the beginning is there; no dropped one is among them.
        eos_labels: how many labels are the tokenizer's end of sequence; None where nobody counted.
        compute: how the numbers were made, as plain JSON values: what may make them differ in the last bits.
        committed: after the `with` block, whether this writer committed the shard; False if another one did.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        self.number, self.rows, self.labels = number, 0, 0
        self.planned_rows: int | None = None
        self.documents = _share(manifest, number)
        self.dropped_by: dict[str, int] = {}
        self.bad_records: Sequence[Mapping[str, Any]] = ()
        self.cut, self.truncated = 0, 0
        self.eos_labels: int | None = None
        self.compute: dict[str, Any] = {}
        self.committed = False
        self.entropies: list[int] | None = [] if manifest.known.entropy else None
        self._manifest = manifest
        self._data: ShardWriter | None = None  # of a shard that somebody has committed already

    @property
    def dropped(self) -> int:
        """How many documents became no rows."""
        return sum(self.dropped_by.values())

    @dropped.setter
    def dropped(self, documents: int) -> None:
        self.dropped_by = {_NO_REASON: documents}

    def write(
        self,
        tokens: ArrayLike,
        targets: SparseTargets,
        *,
        piece_lengths: ArrayLike | None = None,
        documents: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        supervised: ArrayLike | None = None,
        extras: Extras | None = None,
        prefixes: Sequence[Prefix | None] | None = None,
    ) -> None:
        """Append a row.

        Args:
            tokens: `[n]` token ids, without padding, 1 <= n <= seq_len.
            targets: `[N]`, of the row's labelled slots in order. Slot t is labelled if token t + 1 is of the same piece
                and may be a label; its target is the teacher's distribution over what follows tokens 0 to t. Targets
                `[n]` of every token's slot are taken as well, those of unlabelled slots being dropped.
            piece_lengths: `[P]` tokens of each piece, all of the row together; by default the row is one piece.
            documents: `[P]` the document of each piece; by default 0.
            labels: `[n]` or `[L]` the true next token of each slot, -100 where there is none, as it is in a batch.
            supervised: `[n]` bool, whether each token may be a label; another way to say what `labels` says.
            extras: `[n, width]` by name, a vector for each token (`[N, width]`, one for each labelled slot, where the
                extra is per position).
            prefixes: `[P]` what the teacher read in front of each piece, and in place of its first tokens; None where
                it read what its student does. The target of slot t then is the teacher's after that and the tokens that
                it read of the piece, up to t.

        Raises:
            TargetError: targets that are not of the cache's selection and temperatures, or hold values that no targets
                can have.
            ConfigError: tokens, pieces, documents, labels or prefixes that no row can have.
        """
        where = f"row {self.rows} of shard {self.number}"
        row = given_row(self._manifest, where, tokens, piece_lengths, documents, labels, supervised, prefixes)
        labelled = row.labels(self._manifest.seq_len) != IGNORE
        wanted, given = int(labelled.sum()), len(targets.count) if targets.count.ndim == 1 else -1
        if given == len(row.tokens):
            targets = targets[torch.from_numpy(labelled[: len(row.tokens)])]
        elif given != wanted:
            raise TargetError(f"{where} has targets of shape {tuple(targets.count.shape)} for {wanted} labelled slots")
        manifest, known = self._manifest, self._manifest.known
        targets = drop_unknown(targets.to("cpu"), known)
        fault = find_fault(targets, manifest.rule, manifest.temperatures, manifest.vocab_size, known)
        if fault is not None:
            position, what = fault
            at = "" if position is None else f" at slot {np.flatnonzero(labelled)[position]}"
            raise TargetError(f"{where} has{at} {what}")
        self.write_row(row, targets, extras)

    def write_row(
        self,
        row: PackedRow,
        targets: SparseTargets,
        extras: Extras | None = None,
        *,
        record: Record | None = None,
    ) -> None:
        """Append a packed row, the targets `[N]` of its labelled slots, which are not checked, and its extras.

        Those that the cache's position filter leaves out are dropped; the entropies of all are counted. A row that is
        packed already, so that `targets` lacks what was left out, comes with its record; its extras are not looked at.
        """
        if self._data is not None:
            counted = self.entropies
            if counted is not None:
                counted = add_histograms([counted, histogram(targets.require("entropy", "a cache that knows it"))])
            kept = targets if record else self._manifest.position_filter.apply(targets)
            self._data.write(row, kept, record, extras)
            self.entropies = counted  # a row that was refused counts for nothing
        self.rows, self.labels = self.rows + 1, self.labels + len(targets.count)


def _share(manifest: Manifest, shard: int) -> int:
    """Documents of a shard, where all shards have as many as others or one more."""
    return (shard + 1) * manifest.documents // manifest.shards - shard * manifest.documents // manifest.shards


def _fingerprint(text: str) -> str:
    """A sha256 as it is; of other text, its own."""
    return text if re.fullmatch("[0-9a-f]{64}", text) else hashlib.sha256(text.encode()).hexdigest()


def _read_tokenizer(folder: str | os.PathLike[str] | None) -> tuple[dict[str, bytes], str]:
    """The files of a tokenizer as its library saves them, and its fingerprint."""
    if folder is None:
        return {}, _fingerprint("")
    tokenizer = load_tokenizer(Path(folder))
    return tokenizer_files(tokenizer), tokenizer_fingerprint(tokenizer)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The content of the files that a tokenizer saves, by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {p.name: p.read_bytes() for p in sorted(Path(scratch).rglob("*")) if p.is_file()}
