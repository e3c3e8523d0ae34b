"""Sources: the documents of a corpus, the same from whatever files it is made of.

Each file is read by address (see `open_source`), so a corpus may exceed memory, and a shard is read without the
documents before it.

Cost: opening looks at names, sizes and the first records. Nothing reads all documents but the survey.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.corpus.documents import Document
from kdcache.corpus.forms import Columns, choose_form
from kdcache.corpus.open_source import Source, open_source
from kdcache.corpus.plan import Address, CorpusFile, Plan
from kdcache.corpus.record_form import Form
from kdcache.corpus.records import Record, Unreadable, without_nulls
from kdcache.corpus.tables import Table
from kdcache.corpus.text_files import END, Addresses, TextFiles
from kdcache.errors import ConfigError, CorpusError

SPLITS = ("paragraph", "line", "file")

Part = tuple[int, int, int]
"""Documents of one file between two addresses: file, start, stop."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which documents to leave out.

    Attributes:
        min_chars: shorter texts are dropped.
        drop: texts in which this regular expression is found are dropped.
        limit_docs: only the first so many documents count, before any filter.

    Raises:
        ConfigError: a pattern that does not compile, or a number out of range.
    """

    min_chars: int = 0
    drop: str | None = None
    limit_docs: int | None = None

    def __post_init__(self) -> None:
        if self.min_chars < 0:
            raise ConfigError(f"min_chars is {self.min_chars}, but must not be negative")
        if self.limit_docs is not None and self.limit_docs < 1:
            raise ConfigError(f"limit_docs is {self.limit_docs}, but must be at least 1")
        try:
            re.compile(self.drop or "")
        except re.error as error:
            raise ConfigError(f"drop {self.drop!r} is not a regular expression: {error}") from None

    def reason(self, text: str) -> str | None:
        """Why a document of this text is left out: the name of a filter, or None where it stays."""
        if len(text) < self.min_chars:
            return "min-chars"
        return "drop" if self.drop and re.search(self.drop, text) else None

    @property
    def looks_at_text(self) -> bool:
        """Whether any filter reads the text."""
        return bool(self.min_chars or self.drop)


@dataclass(frozen=True, kw_only=True)
class Digests:
    """What a survey keeps of some documents.

    Attributes:
        sha256: the sha256 of each, one behind the other.
        characters: `[n]` int64, the length of each; tokens where the corpus is tokenised.
        addresses: `[n]` int64, where each begins.
    """

    sha256: bytes
    characters: NDArray[np.int64]
    addresses: NDArray[np.int64]


class Corpus:
    """Documents in order.

    Attributes:
        name: as its user names it.
        form: what its documents are made of.
        filters: documents that are left out.
        split, split_text: see `open_corpus`.
    """

    def __init__(
        self, name: str, source: Source, form: Form, filters: Filters, split: str, split_text: str, columns: Columns
    ) -> None:
        self.name, self.form, self.filters = name, form, filters
        self.split, self.split_text, self.columns = split, split_text, columns
        self._source = source

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """Names and sizes of its files, in the order in which they are read."""
        return self._source.files

    @property
    def total(self) -> int:
        """Bytes of all its files, about; known before anything is read."""
        return self._source.total

    @cached_property
    def reading(self) -> dict[str, Any]:
        """How files become documents, as a plan records it."""
        return {
            "form": self.form.name,
            "columns": list(self.form.columns.values()),
            "beside": sorted(self.form.optional.values()),
            "split": self.split,
            "split_text": self.split_text,
        }

    def parts(self, start: Address = (0, 0), stop: Address | None = None, units: bool = False) -> Iterator[Part]:
        """The documents from one address to another, in parts that are worth reading at once, to be read in order.

        Args:
            start: where the first document begins; of the whole corpus, the start of its first file.
            stop: where the one after the last begins; None for the end of the corpus.
            units: in parts that several processes may read, each cut by this method again. One may end behind its file.
        """
        last_file, last = stop or (len(self.files), 0)
        for file in range(start[0], min(last_file + 1, len(self.files))):
            at = max(start[1] if file == start[0] else 0, self._source.begin(file))
            end = last if file == last_file else END
            while at < end:
                cut = min(end, (self._source.unit if units else self._source.cut)(file, at))
                if cut <= at:
                    break
                yield file, at, cut
                at = cut

    @property
    def plain(self) -> bool:
        """Whether its files are text, and hold nothing else."""
        return self._source.plain

    @property
    def one_unit(self) -> bool:
        """Whether a file is read by one process, since it has no places where another may begin (by the first)."""
        return self._source.unit(0, self._source.begin(0)) == END

    def read(self, part: Part) -> tuple[list[Record], Addresses]:
        """The records of a part, and where each begins.

        Raises:
            CorpusError: the file cannot be read, or is not what it was.
        """
        try:
            records, addresses = self._source.read(*part)
        except CorpusError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorpusError(f"the corpus {self.name} cannot be read: {reason(error)}") from error
        if self._source.fills_nulls and self.form.name not in ("text", "tokenised"):
            records = [without_nulls(record) for record in records]
        return records, addresses

    def document(self, record: Record) -> Document | None:
        """What a record says; None where its column is null.

        Raises:
            BadDocument: it cannot be used.
        """
        return self.form.document(record)

    def place(self, part: Part, address: int) -> str:
        """Where a record stands, for people."""
        what = "byte" if isinstance(self._source, TextFiles) else "row"
        return f"{self.files[part[0]].name}, {what} {int(address):,}"

    def examine(self, part: Part) -> Digests:
        """What a survey keeps of a part.

        Raises:
            CorpusError: the file cannot be read.
        """
        if self.form.name == "text" and not self.form.optional and isinstance(self._source, TextFiles):
            found = self._source.digest(*part)
            if found:
                return Digests(sha256=found[0], characters=found[1], addresses=found[2])
        records, addresses = self.read(part)
        sha256, characters = self.digest(records)
        return Digests(sha256=sha256, characters=characters, addresses=np.asarray(addresses, np.int64))

    def digest(self, records: Sequence[Record]) -> tuple[bytes, NDArray[np.int64]]:
        """The sha256 of each record, one behind the other, and their lengths."""
        sha256 = hashlib.sha256
        if self.form.name == "text" and not self.form.optional:  # the common case, at twice the speed
            with suppress(UnicodeEncodeError, KeyError, TypeError, AttributeError):
                column = self.form.columns["text"]
                texts = [record if type(record) is str else record[column] for record in records]  # type: ignore[index]
                found = b"".join([sha256(text.encode()).digest() for text in texts])
                return found, np.fromiter(map(len, texts), np.int64, len(texts))
        contents = [_content(record, self.form) for record in records]
        digests = b"".join([sha256(content).digest() for content, _ in contents])
        return digests, np.array([length for _, length in contents], np.int64)

    def read_shard(self, plan: Plan, shard: int) -> Iterator[tuple[int, Part, list[Record], Addresses]]:
        """The records of a shard, a part at a time.

        Yields:
            The number of the first record, the part, its records, and where each begins.

        Raises:
            CorpusError: they are not the documents that were planned. What was yielded before must not be used.
        """
        number, left = int(plan.first[shard]), plan.documents_of(shard)
        content = hashlib.sha256()
        told = f"the documents of shard {shard} in {self.name} are not those that the cache was planned from"
        for part in self.parts(plan.start(shard), plan.start(shard + 1)):
            try:
                records, addresses = self.read(part)
                records = records[:left]
                content.update(self.digest(records)[0])
            except CorpusError as error:
                raise CorpusError(f"{told}: {error}") from error
            yield number, part, records, addresses
            number, left = number + len(records), left - len(records)
            if not left:
                break
        if content.digest() != plan.sha256[shard].tobytes():
            raise CorpusError(f"{told}: their sha256 differs")


def _content(record: Record, form: Form) -> tuple[bytes, int]:
    """The bytes of a record, the same in whatever file it stands, and its length."""
    if isinstance(record, Unreadable):
        return b"\xfe" + record.data, len(record.data)  # no text encodes to this
    if isinstance(record, str):
        return record.encode("utf-8", "surrogatepass"), len(record)
    if form.name == "text" and not form.optional:
        text = record.get(form.columns["text"])
        if isinstance(text, str):
            return text.encode("utf-8", "surrogatepass"), len(text)
    fields = without_nulls(record)
    if not fields:
        return b"\xff", 0
    try:
        content = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
    except (TypeError, ValueError):  # half of a surrogate pair, or a number of more than 64 bits
        content = json.dumps(fields, sort_keys=True, default=str).encode()
    ids = fields.get("input_ids")
    return content, len(ids) if form.name == "tokenised" and isinstance(ids, list) else len(content)


def open_corpus(
    spec: str,
    *,
    split: str = "train",
    split_text: str = "paragraph",
    columns: Columns | None = None,
    filters: Filters | None = None,
) -> Corpus:
    """Open a corpus.

    Args:
        spec: a path, glob, folder or URL, or `hf:NAME[:CONFIG]`.
        split: the split to read from `hf:` and from folders that hold several.
        split_text: what one document of a `.txt` file is: a `paragraph` (lines up to a blank
            one), a `line` that is not blank, or the whole `file`.
        columns: names of the columns, where they are not the usual ones.
        filters: documents to leave out.

    Raises:
        CorpusError: nothing there, a missing column, a column of another type.
        ConfigError: a setting out of range.
    """
    if split_text not in SPLITS:
        raise ConfigError(f"split_text {split_text!r} is not one of {', '.join(SPLITS)}")
    filters, columns = filters or Filters(), columns or Columns()
    try:
        source, names = open_source(spec, split, split_text)
        form = choose_form(spec, names, columns)
        if isinstance(source, Table):
            _require_types(spec, source.schema, form)
            there = {role: name for role, name in form.optional.items() if name in names}
            form = Form(name=form.name, columns=form.columns, optional=there)  # its columns are all known
    except (CorpusError, ConfigError):
        raise
    except Exception as error:  # libraries raise what their backends raise; a person needs the reason, not the stack
        raise CorpusError(f"the corpus {spec} cannot be read: {reason(error)}") from error
    if form.name == "tokenised" and filters.looks_at_text:
        raise ConfigError("min_chars and drop read text, but this corpus is already tokenised")
    if not source.plain:
        source.choose(form.wanted)
    return Corpus(spec, source, form, filters, split, split_text, columns)


def _require_types(spec: str, schema: pa.Schema, form: Form) -> None:
    """Refuse a column of a table whose every document would be bad."""
    if form.name not in ("text", "tokenised"):
        return  # messages come in many types, and are looked at one by one
    for column in form.columns.values():
        kind = schema.field(column).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        fits = {
            "text": pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
            "tokenised": listed and pa.types.is_integer(kind.value_type),
        }[form.name]
        if not fits:
            wanted = {"text": "text", "tokenised": "lists of integers"}[form.name]
            raise CorpusError(f"the corpus {spec}: column {column!r} holds {kind}, not {wanted}")


def reason(error: BaseException) -> str:
    """What is wrong with a corpus, in one line, out of a chain of causes: an encoding, a parser's word, the last."""
    chain = [error]
    while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(cause)
    for seen in chain:
        if isinstance(seen, UnicodeDecodeError):
            return f"it is not UTF-8 ({seen.reason} at byte {seen.start})"
    best = next((seen for seen in chain if isinstance(seen, pa.ArrowInvalid)), chain[-1])
    return (str(best).strip().splitlines() or [type(best).__name__])[0]
