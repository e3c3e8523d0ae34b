"""The manifest: what a cache is, written once by whoever creates it.

Everything a reader needs and everything that a worker must agree on before it adds a shard.
Where things came from (paths, hub names, versions) is recorded in further fields, and may differ.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from kdcache.codec import Codec, Layout, make_codec
from kdcache.codec.id_ranks import MOST_ORDERED
from kdcache.codec.plain import PRECISIONS
from kdcache.codec.streams import deflate, id_dtype
from kdcache.corpus.rules import require_rules
from kdcache.errors import CacheError, CacheMismatchError, ConfigError, CorruptCacheError
from kdcache.extras import ExtraSpec, read_specs
from kdcache.known import Known
from kdcache.position_filter import PositionFilter
from kdcache.prefixes import PREFIXES_A_ROW
from kdcache.rows import RowSpec
from kdcache.selection import Selection, check_temperatures
from kdcache.store.registry import find_store
from kdcache.store.row_format import RowFormat, read_stream
from kdcache.store.sealed_json import checksum, is_count, read_record, require_fields, seal, short
from kdcache.store.storage import Storage, inside

FORMAT = 1
NAME = "kdcache.json"

PLAN = "plan.arrow"
_OF_THE_CREATOR = ("origin", "tokenizer_files", "id_order", "error_bound", "plan", "date")
"""Fields that all other workers take from the existing manifest."""

MOST_SHARDS = 10_000_000
_PLAN_ROW, _MOST_PLAN = 80, 64 << 20
"""Bytes that a plan may have: for each shard, and for its schema with the names of the corpus's files."""

_MOST_IDS = (1 << 31) - 1
_MOST_TEMPERATURES = 64
_MOST_ROW = 1 << 30
"""Bytes of the streams of a row, unpacked. So whoever writes a manifest bounds what reading a row may allocate."""


@dataclass(frozen=True, kw_only=True)
class _PlanObject:
    """The fields of `plan`."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _TeacherContext:
    """The fields of `teacher_context`."""

    seq_len: int
    system: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `kdcache.json`.

    Attributes:
        teacher_sha256, tokenizer_sha256, corpus_sha256: fingerprints of content.
        tokenizer_files: sha256 of each file under `tokenizer/`.
        filters: what was left out of the corpus.
        documents: documents in the corpus, filtered ones included.
        shards: shards planned.
        plan: `bytes` and `sha256` of `plan.arrow`, which says which documents each shard holds; empty where a cache was
            not made from a corpus, and only its commits say how many documents a shard has.
        date: the day, in UTC, on which the cache was created, as `YYYY-MM-DD`; what a chat template may ask for.
        on_bad_record, eos, pack, overlong: how documents become rows; see `kdcache.corpus.rules`.
        vocab_size: ids lie below it; that of the tokenizer.
        seq_len: slots a row.
        isolate: whether packed pieces are kept from seeing each other.
        selection: `kind` and each of its settings, those that a pilot found included.
        known: what the targets know of the teacher; nothing else is stored.
        positions: which labelled slots carry a target: `all`, or `entropy>X`.
        seed: of the draws of sampled kinds; 0 for the others.
        temperatures: T of each stored partition and tail.
        precision: how values are stored: `float32`, `float16`, or a number of bits.
        error_bound: the most by which stored numbers are off, by name.
        id_order: ids by falling frequency in the pilot, for the compact codec.
        store: `arrow`, `zarr`, or the name of a registered one.
        extras: further arrays of a row by name, each as `ExtraSpec.to_fields` gives it.
        origin: names and versions, for people; two caches of one configuration may differ here.
        teacher_context: `seq_len`, the most tokens that the teacher reads for a piece, and `system`, the system prompt
            that it alone is given, or None; empty where it reads what its student does, and then not written.
    """

    teacher_sha256: str
    tokenizer_sha256: str
    tokenizer_files: dict[str, str]
    corpus_sha256: str
    filters: dict[str, Any]
    documents: int
    shards: int
    plan: dict[str, Any]
    date: str
    on_bad_record: str
    eos: str
    pack: str
    overlong: str
    vocab_size: int
    seq_len: int
    isolate: bool
    selection: dict[str, Any]
    known: Known
    positions: str
    seed: int
    temperatures: tuple[float, ...]
    precision: str
    error_bound: dict[str, Any]
    id_order: tuple[int, ...]
    store: str
    origin: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)
    teacher_context: dict[str, Any] = field(default_factory=dict)

    @property
    def extra_specs(self) -> dict[str, ExtraSpec]:
        """What each extra holds, by name, in order of name."""
        return read_specs(self.extras)

    @property
    def rule(self) -> Selection:
        """The selection."""
        return Selection.from_fields(self.selection)

    @property
    def position_filter(self) -> PositionFilter:
        """Which labelled slots carry a target."""
        return PositionFilter(self.positions)

    @property
    def row_spec(self) -> RowSpec:
        """The shape of its rows."""
        packed = self.pack != "none"
        return RowSpec(
            vocab_size=self.vocab_size, seq_len=self.seq_len, isolate=self.isolate and packed, packed=packed
        )  # fmt: skip

    @property
    def teacher_row_spec(self) -> RowSpec:
        """The shape of the rows that its teacher is given, which hold the contexts that it alone reads."""
        longest = self.teacher_context["seq_len"] if self.teacher_context else self.seq_len
        return dataclasses.replace(self.row_spec, seq_len=longest)

    @property
    def width(self) -> int:
        """K, the most entries of a position."""
        return self.rule.width(self.vocab_size)

    @cached_property
    def codec(self) -> Codec:
        """The layout of targets."""
        layout = Layout.of(self.rule, self.vocab_size, self.temperatures, self.known)
        return make_codec(layout, self.precision, self.id_order)

    @cached_property
    def sha256(self) -> str:
        """The checksum that commits name; of a manifest that was read, the one that it holds."""
        return checksum(self.to_fields())

    def exact_at(self, temperature: float) -> bool:
        """Whether targets at this temperature are exact."""
        return temperature in self.temperatures or self.width == self.vocab_size

    def to_fields(self) -> dict[str, Any]:
        """The JSON object, without its checksum."""
        fields = dataclasses.asdict(self)
        fields["temperatures"] = list(self.temperatures)
        fields["known"] = self.known.to_fields()
        fields["id_order"] = _fold_order(self.id_order, self.vocab_size)
        if not self.teacher_context:
            del fields["teacher_context"]  # a manifest without it is that of earlier versions
        return {"format": FORMAT, **fields}

    @classmethod
    def read(cls, storage: Storage) -> Self:
        """Read a cache's manifest.

        Raises:
            CacheError: no cache there, or one of a format that this version does not know.
            CorruptCacheError: damaged.
        """
        path = storage.path_of(NAME)
        try:
            fields = read_record(storage, NAME)
        except FileNotFoundError:
            raise CacheError(f"{storage} holds no cache: there is no {NAME}") from None
        form, sha256 = fields.pop("format", None), fields.pop("checksum")
        if is_count(form) and form != FORMAT:
            raise CacheError(f"{path} is of format {form}; this version reads format {FORMAT}")
        try:
            if not is_count(form):
                raise ValueError(f"its format is {short(repr(form))}")
            if not fields.get("teacher_context", True):
                raise ValueError("its teacher_context is empty")
            require_fields({"teacher_context": {}, **fields}, cls)
            _require_vocabulary(fields["vocab_size"])  # bounds what the order may unfold to
            order = _unfold_order(fields["id_order"], fields["vocab_size"])
            known = Known.from_fields(fields["known"])
            manifest = cls(**{
                **fields, "temperatures": tuple(fields["temperatures"]), "id_order": order, "known": known,
            })  # fmt: skip
            manifest.require_sound()
        except (TypeError, ValueError, ConfigError, CorruptCacheError, OverflowError) as error:
            raise CorruptCacheError(f"{path} does not describe a cache: {short(error, 200)}") from None
        vars(manifest)["sha256"] = sha256  # another zstd might fold the order otherwise
        return manifest

    def require_sound(self) -> None:
        """Refuse what no cache can be; this, and not the size of a number, bounds what a reader allocates.

        Raises:
            ConfigError: a number that is too large, or settings that contradict each other.
            CorruptCacheError: an order of ids that repeats one, or a tokenizer file that is not a plain name.
        """
        _require_vocabulary(self.vocab_size)
        if self.position_filter.rule != self.positions:
            raise ConfigError(f"positions {self.positions!r} must be spelled {self.position_filter.rule!r}")
        if self.position_filter.above is not None:
            self.known.require("entropy", f"the position filter {self.positions}")
        if self.rule.needs_pilot:
            raise ConfigError(f"{', '.join(self.rule.pilot_settings)} of kind {self.rule.kind} is missing")
        check_temperatures(self.temperatures)
        if len(self.temperatures) > _MOST_TEMPERATURES:
            raise ConfigError(f"{len(self.temperatures)} temperatures are above the limit of {_MOST_TEMPERATURES}")
        for name in ("documents", "shards", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.shards > min(self.documents, MOST_SHARDS):
            raise ConfigError(
                f"{self.shards:,} shards of {self.documents:,} documents are above the limit of one a document and "
                f"{MOST_SHARDS:,} in all; make shards larger"
            )
        if self.plan:
            require_fields(self.plan, _PlanObject)
            if self.plan["bytes"] > _MOST_PLAN + _PLAN_ROW * self.shards:
                raise ConfigError(f"a plan of {self.plan['bytes']:,} bytes is too large for {self.shards:,} shards")
        try:
            if datetime.date.fromisoformat(self.date).isoformat() != self.date:
                raise ValueError
        except ValueError:
            raise ConfigError(f"date is {short(repr(self.date))}, not a day like 2026-11-28") from None
        require_rules(vars(self))
        self.require_teacher_context()
        if self.row_format.most_bytes > _MOST_ROW:
            raise ConfigError(
                f"a row of seq_len {self.seq_len} slots may hold {self.row_format.most_bytes:,} bytes, above the "
                f"limit of {_MOST_ROW:,}; make rows shorter, or keep fewer entries or extras"
            )
        find_store(self.store)
        for name in self.tokenizer_files:
            if "/" in inside(name):
                raise CorruptCacheError(f"tokenizer file {name} is not a plain name")

    def require_teacher_context(self) -> None:
        """Refuse a context of the teacher's that no cache can have.

        Raises:
            ConfigError: rows that are not isolated, extras of tokens, or a teacher that reads less than its student.
        """
        if not self.teacher_context:
            return
        require_fields(self.teacher_context, _TeacherContext)
        longest = self.teacher_context["seq_len"]
        if longest < self.seq_len:
            raise ConfigError(f"teacher_seq_len is {longest}, but a row of the student has {self.seq_len} tokens")
        if not self.isolate:
            raise ConfigError("a teacher context stands in front of one piece, so it needs isolate")
        per_token = [name for name, spec in self.extra_specs.items() if spec.per == "token"]
        if per_token:
            raise ConfigError(
                f"extra {per_token[0]} has a vector for each token, but a teacher with a context of its own does not "
                "read all tokens of its student; leave out one of the two"
            )

    @property
    def row_format(self) -> RowFormat:
        """How rows become streams."""
        return RowFormat(
            codec=self.codec, seq_len=self.seq_len, vocab_size=self.vocab_size, documents=self.documents,
            filtered=self.position_filter.above is not None, extras=self.extra_specs,
            typed=self.precision in PRECISIONS,
            prefix_tokens=PREFIXES_A_ROW * self.teacher_row_spec.seq_len if self.teacher_context else 0,
        )  # fmt: skip

    def create(self, storage: Storage) -> Manifest:
        """Write the manifest unless another worker has; return the one that is there.

        Raises:
            ConfigError: see `require_sound`.
            CacheMismatchError: the one that is there is of another configuration.
        """
        self.require_sound()
        if storage.create(NAME, seal(self.to_fields())):
            return self
        existing = Manifest.read(storage)
        existing.require_same(self, storage)
        return existing

    def require_same(self, other: Manifest, storage: Storage) -> None:
        """Refuse to add to a cache that was made otherwise.

        Raises:
            CacheMismatchError: naming each field that differs, with both values.
        """
        mine, theirs = self.to_fields(), other.to_fields()
        differences = [
            f"{name} (cache: {short(mine.get(name), most)}, asked: {short(theirs.get(name), most)})"
            for name in {**mine, **theirs}
            for most in (15 if name.endswith("sha256") else 60,)
            if name not in _OF_THE_CREATOR and mine.get(name) != theirs.get(name)
            if name != "selection" or not self.rule.same_but_for_pilot(other.rule)
        ]
        if differences:
            raise CacheMismatchError(
                f"{storage} holds a cache of another configuration; it differs in {', '.join(differences)}; "
                "choose another folder, or the same options"
            )


def today() -> str:
    """The day in UTC, as a manifest has it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _fold_order(order: tuple[int, ...], vocab_size: int) -> str:
    """Base64 of a zstd frame of the ids: a list in JSON would outweigh the targets of a small cache."""
    return base64.b64encode(deflate(np.array(order, id_dtype(vocab_size)))).decode()


def _unfold_order(text: str, vocab_size: int) -> tuple[int, ...]:
    frame, most = base64.b64decode(text, validate=True), min(vocab_size, MOST_ORDERED)
    return tuple(read_stream(frame, id_dtype(vocab_size), (most,)).tolist())


def _require_vocabulary(size: int) -> None:
    if not 1 <= size <= _MOST_IDS:
        raise ConfigError(f"the vocabulary has {size:,} tokens, outside 1 to {_MOST_IDS:,}")
