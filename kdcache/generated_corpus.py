"""The record of a generated corpus: who wrote it, with which settings, and which files it has.

`kdcache generate` writes it before the first file of text, as `kdcache-corpus.json` beside them. Whoever goes on with
the corpus must ask for the same. Whoever dumps it learns who wrote it, and that all of it is there; the cache keeps
that in its manifest, as `origin["generated"]`.
Cost: one small file.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kdcache.corpus.find_files import GENERATED, KINDS, is_url, local_path
from kdcache.errors import CorpusError, CorruptCacheError
from kdcache.store.open_storage import open_storage
from kdcache.store.sealed_json import read_record, require_fields, seal, short
from kdcache.store.storage import Storage

FORMAT = 1
_OF_THE_CREATOR = ("origin", "date")
"""Fields that others take from the record that is there."""


@dataclass(frozen=True, kw_only=True)
class GeneratedCorpus:
    """Contents of `kdcache-corpus.json`.

    Attributes:
        writer_sha256: fingerprint of the model that wrote, as a cache has it of its teacher.
        vocabulary_sha256: of what each token id stands for.
        prompts_sha256: of the prompts as the writer read them: their content, the tokenizer and its template.
        settings: what decides which tokens are written: `temperature`, `top_p`, `max_new_tokens`, `stop_tokens`,
            `seed`, `samples`, `batch_rows` and `dtype`.
        documents: prompts, or documents that are written from nothing.
        shards: files of text.
        date: the day, in UTC, that a chat template may ask for.
        origin: names and versions, for people; two corpora of one configuration may differ here.
    """

    writer_sha256: str
    vocabulary_sha256: str
    prompts_sha256: str
    settings: dict[str, Any]
    documents: int
    shards: int
    date: str
    origin: dict[str, Any]

    def file(self, shard: int) -> str:
        """The name of the file of a shard."""
        return f"shard-{shard:0{max(5, len(str(self.shards - 1)))}d}.jsonl"

    def missing(self, storage: Storage) -> list[int]:
        """The shards that are not written yet."""
        there = set(storage.names())
        return [shard for shard in range(self.shards) if self.file(shard) not in there]

    @property
    def described(self) -> dict[str, Any]:
        """What a cache of it keeps, as plain values."""
        return {
            **{name: self.origin.get(name) for name in ("writer", "prompts")},
            "writer_sha256": self.writer_sha256,
            "prompts_sha256": self.prompts_sha256,
            **self.settings,
        }

    @classmethod
    def read(cls, storage: Storage) -> Self | None:
        """The record of a corpus; None where there is none.

        Raises:
            CorpusError: it is damaged, or of a format that this version does not know.
        """
        path = storage.path_of(GENERATED)
        try:
            fields = read_record(storage, GENERATED)
        except FileNotFoundError:
            return None
        except CorruptCacheError as error:
            raise CorpusError(str(error)) from None
        form = fields.pop("format", None)
        fields.pop("checksum")
        if form != FORMAT:
            raise CorpusError(f"{path} is of format {short(repr(form))}; this version reads format {FORMAT}")
        try:
            require_fields(fields, cls)
        except (ValueError, KeyError) as error:
            raise CorpusError(f"{path} does not describe a generated corpus: {short(error, 200)}") from None
        return cls(**fields)

    def create(self, storage: Storage) -> GeneratedCorpus:
        """Write the record unless there is one; return the one that is there.

        Raises:
            CorpusError: the folder holds a corpus that is generated otherwise.
        """
        if storage.create(GENERATED, seal({"format": FORMAT, **dataclasses.asdict(self)})):
            return self
        existing = GeneratedCorpus.read(storage)
        assert existing is not None
        existing.require_same(self, storage)
        return existing

    def require_free(self, storage: Storage) -> None:
        """Refuse a folder that holds something else than this corpus.

        Raises:
            CorpusError: there are other files.
        """
        strangers = storage.names()
        if strangers and storage.size(GENERATED) is None:  # else another worker was quick
            raise CorpusError(
                f"{storage} holds no generated corpus but other files, such as {strangers[0]}; choose another folder"
            )

    def require_same(self, other: GeneratedCorpus, storage: Storage) -> None:
        """Refuse to go on with a corpus that is generated otherwise.

        Raises:
            CorpusError: naming each field that differs, with both values.
        """
        mine, theirs = (
            {**{f.name: getattr(each, f.name) for f in dataclasses.fields(each)}, **each.settings}
            for each in (self, other)
        )
        differences = [
            f"{name} (there: {short(mine[name], most)}, asked: {short(theirs.get(name), most)})"
            for name in mine
            for most in (15 if name.endswith("sha256") else 60,)
            if name not in (*_OF_THE_CREATOR, "settings") and mine[name] != theirs.get(name)
        ]
        if differences:
            raise CorpusError(
                f"{storage} holds a corpus that is generated otherwise; it differs in {', '.join(differences)}; choose "
                "another folder, or the same options"
            )


def find_generated(corpus: str) -> GeneratedCorpus | None:
    """The record of the generated corpus that a path, glob, folder or URL names, or in which it names files.

    Raises:
        CorpusError: it is damaged; or a whole corpus is named, and not all of it is written yet.
    """
    if corpus.startswith(("http://", "https://")) or (corpus.startswith("hf:") and not is_url(corpus)):
        return None
    folder = _folder(corpus)
    storage = open_storage(folder)
    found = GeneratedCorpus.read(storage)
    if found is not None and folder == corpus and (missing := found.missing(storage)):
        raise CorpusError(
            f"the corpus {corpus} is not all written: {len(missing)} of {found.shards} shards are missing; run kdcache "
            "generate again with the same options"
        )
    return found


def _folder(corpus: str) -> str:
    """The folder of a corpus: itself, or that of the file or the glob."""
    if not is_url(corpus) and Path(local_path(corpus)).is_dir():
        return corpus
    fixed = re.split(r"[*?\[]", corpus, maxsplit=1)[0]
    name = posixpath.basename(corpus).lower()
    one_file = any(suffix in name for suffix in KINDS) if is_url(corpus) else True
    return posixpath.dirname(fixed) or "." if fixed != corpus or one_file else corpus
