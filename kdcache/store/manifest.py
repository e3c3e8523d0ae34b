"""The manifest: what a cache is, written once by whoever creates it.

Everything a reader needs and everything that a worker must agree on before it adds a shard.
Where things came from (paths, hub names, versions) is recorded beside it and may differ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from kdcache.codec import Codec, make_codec
from kdcache.errors import CacheError, CacheMismatchError, ConfigError, CorruptCacheError
from kdcache.selection import Selection
from kdcache.store.durable import write_new
from kdcache.store.record import checksum, read_record, seal

FORMAT = 1
NAME = "kdcache.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `kdcache.json`.

    Attributes:
        teacher_sha256, tokenizer_sha256, corpus_sha256: fingerprints of content.
        tokenizer_files: sha256 of each file under `tokenizer/`.
        filters: what was left out of the corpus.
        documents: documents in the corpus, filtered ones included.
        docs_per_shard: shard s covers documents [s * docs_per_shard, (s + 1) * docs_per_shard).
        vocab_size: ids lie below it; that of the tokenizer.
        seq_len: slots a row.
        isolate: whether packed pieces are kept from seeing each other.
        selection: kind and settings of the selection.
        temperatures: T of each stored partition and tail.
        precision: how values are stored: `float32`, `float16`, or a number of bits.
        id_order: ids by falling frequency in the pilot, for the compact codec.
        store: `arrow`.
        origin: names and versions, for people; two caches of one configuration may differ here.
    """

    teacher_sha256: str
    tokenizer_sha256: str
    tokenizer_files: dict[str, str]
    corpus_sha256: str
    filters: dict[str, Any]
    documents: int
    docs_per_shard: int
    vocab_size: int
    seq_len: int
    isolate: bool
    selection: dict[str, Any]
    temperatures: tuple[float, ...]
    precision: str
    id_order: tuple[int, ...]
    store: str
    origin: dict[str, Any]

    @property
    def shards(self) -> int:
        """Shards planned."""
        return -(-self.documents // self.docs_per_shard)

    @cached_property
    def codec(self) -> Codec:
        """How targets are laid out."""
        rule = Selection(**self.selection)
        return make_codec(
            kind=rule.kind,
            width=rule.width(self.vocab_size),
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            precision=self.precision,
            id_order=self.id_order,
        )

    @property
    def sha256(self) -> str:
        """The checksum that commits name."""
        return checksum(self.to_fields())

    def exact_at(self, temperature: float) -> bool:
        """Whether targets at this temperature are exact."""
        return temperature in self.temperatures or self.codec.width == self.vocab_size

    def to_fields(self) -> dict[str, Any]:
        """The JSON object, without its checksum."""
        fields = dataclasses.asdict(self)
        fields["temperatures"], fields["id_order"] = list(self.temperatures), list(self.id_order)
        return {"format": FORMAT, **fields}

    @classmethod
    def read(cls, cache: Path) -> Self:
        """Read a cache's manifest.

        Raises:
            CacheError: no cache there, or one of a format that this version does not know.
            CorruptCacheError: damaged.
        """
        path = cache / NAME
        try:
            fields = read_record(path)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(f"{cache} holds no cache: there is no {NAME}") from None
        if fields.get("format") != FORMAT:
            raise CacheError(f"{path} is of format {fields.get('format')!r}; this version reads format {FORMAT}")
        del fields["format"], fields["checksum"]
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise CorruptCacheError(f"{path} does not have the fields of a manifest: {sorted(names ^ set(fields))}")
        try:
            lists = {name: tuple(fields[name]) for name in ("temperatures", "id_order")}
            manifest = cls(**{**fields, **lists})
            _check(manifest)
        except (TypeError, ValueError, KeyError, ConfigError, OverflowError) as error:
            raise CorruptCacheError(f"{path} does not describe a cache: {error}") from None
        return manifest

    def create(self, cache: Path) -> Manifest:
        """Write the manifest unless another worker has; return the one that stands.

        Raises:
            CacheMismatchError: the one that stands is of another configuration.
        """
        if write_new(cache / NAME, seal(self.to_fields())):
            return self
        standing = Manifest.read(cache)
        standing.require_same(self, cache)
        return standing

    def require_same(self, other: Manifest, cache: Path) -> None:
        """Refuse to add to a cache that was made otherwise.

        Raises:
            CacheMismatchError: naming each field that differs, with both values.
        """
        mine, theirs = self.to_fields(), other.to_fields()
        differences = [
            f"{name} (cache: {_short(mine[name])}, asked: {_short(theirs[name])})"
            for name in mine
            if name not in ("origin", "tokenizer_files", "id_order") and mine[name] != theirs[name]
        ]
        if differences:
            raise CacheMismatchError(
                f"{cache} holds a cache of another configuration; it differs in {', '.join(differences)}; "
                "choose another --out or the same options"
            )


def _check(manifest: Manifest) -> None:
    for name in ("documents", "docs_per_shard", "vocab_size", "seq_len"):
        value = getattr(manifest, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 63:
            raise ValueError(f"{name} is {value!r}")
    if manifest.vocab_size > 1 << 31 or manifest.seq_len > 1 << 31:
        raise ValueError("vocab_size and seq_len lie below 2^31")
    if any(not isinstance(t, int | float) or not t > 0 for t in manifest.temperatures):
        raise ValueError(f"temperatures are {manifest.temperatures!r}")
    if manifest.store != "arrow":
        raise ValueError(f"store is {manifest.store!r}")
    for name in manifest.tokenizer_files:
        if Path(name).name != name:
            raise ValueError(f"tokenizer file {name!r} is not a plain name")
    _ = manifest.codec


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "..."
