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
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.corpus.open_source import Source, open_source
from kdcache.corpus.plan import Address, CorpusFile, Plan
from kdcache.corpus.records import Record, Unreadable
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

    def keeps(self, text: str) -> bool:
        """Whether a document of this text stays."""
        return len(text) >= self.min_chars and not (self.drop and re.search(self.drop, text))

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
        kept: how many of them pass the filters.
    """

    sha256: bytes
    characters: NDArray[np.int64]
    addresses: NDArray[np.int64]
    kept: int


class Corpus:
    """Documents in order.

    Attributes:
        name: as its user names it.
        form: `text`, `chat` or `tokenised`.
        columns: the columns that documents are made of.
        filters: documents that are left out.
        split, split_text: see `open_corpus`.
    """

    def __init__(
        self, name: str, source: Source, form: str, columns: tuple[str, ...], filters: Filters, split: str,
        split_text: str,
    ) -> None:  # fmt: skip
        self.name, self.form, self.columns, self.filters = name, form, columns, filters
        self.split, self.split_text = split, split_text
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
            "form": self.form,
            "columns": list(self.columns),
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
    def one_unit(self) -> bool:
        """Whether a file is read by one process, since it has no places where another may begin (by the first)."""
        return self._source.unit(0, self._source.begin(0)) == END

    def read(self, part: Part) -> list[Any]:
        """The documents of a part: texts, conversations, or `(input_ids, labels or None)`.

        Raises:
            CorpusError: bytes that cannot be read as documents.
        """
        return self._read(part)[0]

    def _read(self, part: Part) -> tuple[list[Any], Addresses]:
        try:
            records, addresses = self._source.read(*part)
            documents = [self._document(record) for record in records]
        except CorpusError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorpusError(f"the corpus {self.name} cannot be read: {_reason(error)}") from error
        return documents, addresses

    def _document(self, record: Record) -> Any:
        if isinstance(record, Unreadable):
            raise CorpusError(f"a document cannot be read: {record.reason}")
        if isinstance(record, str):
            return record
        if self.form == "tokenised":
            return record.get("input_ids"), record.get("labels")
        return record.get(self.columns[0])

    def keeps(self, number: int, document: Any) -> bool:
        """Whether a document is there and passes the filters.

        Raises:
            CorpusError: it is of another form.
        """
        if self.form == "tokenised":
            return document[0] is not None
        if document is None:
            return False
        if self.form == "text" and isinstance(document, str):
            return self.filters.keeps(document)
        if self.form == "chat" and isinstance(document, list) and all(isinstance(m, dict) for m in document):
            return self.filters.keeps("\n".join(str(m.get("content")) for m in document))
        wanted = "text" if self.form == "text" else "a list of messages"
        raise CorpusError(
            f"document {number}: column {self.columns[0]!r} holds {type(document).__name__}, not {wanted}"
        )

    def examine(self, part: Part, number: int = 0) -> Digests:
        """What a survey keeps of a part.

        Args:
            part: of the corpus.
            number: of its first document, for messages.

        Raises:
            CorpusError: a document that cannot be read or is of another form.
        """
        if self.form == "text" and not self.filters.looks_at_text and isinstance(self._source, TextFiles):
            found = self._source.digest(*part)
            if found:
                return Digests(sha256=found[0], characters=found[1], addresses=found[2], kept=len(found[1]))
        documents, addresses = self._read(part)
        if self.form == "text" and not self.filters.looks_at_text and all(type(text) is str for text in documents):
            kept = len(documents)
        else:
            kept = sum(self.keeps(n, document) for n, document in enumerate(documents, number))
        sha256, characters = self.digest(documents, number)
        return Digests(sha256=sha256, characters=characters, addresses=np.asarray(addresses, np.int64), kept=kept)

    def digest(self, documents: Sequence[Any], number: int) -> tuple[bytes, NDArray[np.int64]]:
        """The sha256 of each document, one behind the other, and their lengths."""
        sha256 = hashlib.sha256
        if self.form == "text" and all(type(text) is str for text in documents):  # the common case, at twice the speed
            with suppress(UnicodeEncodeError):
                found = b"".join([sha256(text.encode()).digest() for text in documents])
                return found, np.fromiter(map(len, documents), np.int64, len(documents))
        digests, lengths = [], []
        for offset, document in enumerate(documents):
            try:
                content, length = _content(document, self.form)
            except (TypeError, ValueError, AttributeError) as error:
                raise CorpusError(f"document {number + offset} cannot be read: {error}") from None
            digests.append(sha256(content).digest())
            lengths.append(length)
        return b"".join(digests), np.array(lengths, np.int64)

    def read_shard(self, plan: Plan, shard: int) -> Iterator[tuple[int, list[Any]]]:
        """The documents of a shard, a part at a time.

        Yields:
            The number of the first document, and the documents; filtered ones included.

        Raises:
            CorpusError: they are not the documents that were planned. What was yielded before must not be used.
        """
        number, left = int(plan.first[shard]), plan.documents_of(shard)
        content = hashlib.sha256()
        told = f"the documents of shard {shard} in {self.name} are not those that the cache was planned from"
        for part in self.parts(plan.start(shard), plan.start(shard + 1)):
            try:
                documents = self.read(part)[:left]
                content.update(self.digest(documents, number)[0])
            except CorpusError as error:
                raise CorpusError(f"{told}: {error}") from error
            yield number, documents
            number, left = number + len(documents), left - len(documents)
            if not left:
                break
        if content.digest() != plan.sha256[shard].tobytes():
            raise CorpusError(f"{told}: their sha256 differs")


def _content(document: Any, form: str) -> tuple[bytes, int]:
    """The bytes of a document, the same in whatever file it stands, and its length."""
    if document is None:
        return b"\xff", 0  # no text encodes to this
    if form == "text":
        return document.encode(), len(document)
    if form == "chat":
        # A table gives every message every key that any message has.
        messages = [{key: value for key, value in message.items() if value is not None} for message in document]
        text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        return text.encode(), len(text)
    ids, labels = document
    parts = [_integers([] if ids is None else ids)] + ([] if labels is None else [b"|", _integers(labels)])
    return b"".join(parts), len(ids or ())


def _integers(values: Any) -> bytes:
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"it holds {type(values).__name__} of {found.dtype}, not a list of integers")
    return found.astype("<i8").tobytes()


def open_corpus(
    spec: str,
    *,
    split: str = "train",
    split_text: str = "paragraph",
    text_column: str | None = None,
    messages_column: str | None = None,
    filters: Filters | None = None,
) -> Corpus:
    """Open a corpus.

    Args:
        spec: a path, glob, folder or URL, or `hf:NAME[:CONFIG]`.
        split: the split to read from `hf:` and from folders that hold several.
        split_text: what one document of a `.txt` file is: a `paragraph` (lines up to a blank
            one), a `line` that is not blank, or the whole `file`.
        text_column: the column of texts, `text` by default.
        messages_column: the column of conversations, `messages` by default.
        filters: documents to leave out.

    Raises:
        CorpusError: nothing there, a missing column, a column of another type.
        ConfigError: a setting out of range.
    """
    if split_text not in SPLITS:
        raise ConfigError(f"split_text {split_text!r} is not one of {', '.join(SPLITS)}")
    filters = filters or Filters()
    try:
        source, names = open_source(spec, split, split_text)
        form, columns = _named_columns(spec, names, text_column, messages_column)
        if isinstance(source, Table):
            _require_types(spec, source.schema, form, columns)
    except (CorpusError, ConfigError):
        raise
    except Exception as error:  # libraries raise what their backends raise; a person needs the reason, not the stack
        raise CorpusError(f"the corpus {spec} cannot be read: {_reason(error)}") from error
    if form == "tokenised" and filters.looks_at_text:
        raise ConfigError("min_chars and drop read text, but this corpus is already tokenised")
    if not source.plain:
        source.choose(columns)
    return Corpus(spec, source, form, columns, filters, split, split_text)


def _require_types(spec: str, schema: pa.Schema, form: str, columns: tuple[str, ...]) -> None:
    """Refuse columns of another type than the form asks for."""
    for column in columns:
        kind = schema.field(column).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        item = kind.value_type if listed else None
        fits = {
            "text": pa.types.is_string(kind) or pa.types.is_large_string(kind),
            # Messages of unequal keys come as JSON, and are looked at one by one.
            "chat": "arrow.json" in str(kind) or (item is not None and pa.types.is_struct(item)),
            "tokenised": item is not None and pa.types.is_integer(item),
        }[form]
        if not fits:
            wanted = {"text": "text", "chat": "lists of messages", "tokenised": "lists of integers"}[form]
            raise CorpusError(f"the corpus {spec}: column {column!r} holds {kind}, not {wanted}")


def _named_columns(
    spec: str, names: Sequence[str], text_column: str | None, messages_column: str | None
) -> tuple[str, tuple[str, ...]]:
    if text_column and messages_column:
        raise ConfigError("text_column and messages_column exclude each other")
    wanted = text_column or messages_column
    if wanted:
        if wanted not in names:
            raise CorpusError(f"the corpus {spec} has no column {wanted!r}; it has {', '.join(names)}")
        return ("text" if text_column else "chat"), (wanted,)
    if "input_ids" in names:
        return "tokenised", tuple(c for c in ("input_ids", "labels") if c in names)
    for form, column in (("text", "text"), ("chat", "messages")):
        if column in names:
            return form, (column,)
    raise CorpusError(
        f"the corpus {spec} has no column 'text', 'messages' or 'input_ids'; it has {', '.join(names)} "
        "(name one as text_column or messages_column)"
    )


def _reason(error: BaseException) -> str:
    """What is wrong with a corpus, in one line, out of a chain of causes: an encoding, a parser's word, the last."""
    chain = [error]
    while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(cause)
    for seen in chain:
        if isinstance(seen, UnicodeDecodeError):
            return f"it is not UTF-8 ({seen.reason} at byte {seen.start})"
    best = next((seen for seen in chain if isinstance(seen, pa.ArrowInvalid)), chain[-1])
    return (str(best).strip().splitlines() or [type(best).__name__])[0]
