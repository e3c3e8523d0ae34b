"""Sources: what a corpus may be, and the same documents from any of them.

A corpus is a `.txt`, `.jsonl`, `.json`, `.parquet` or `.arrow` file, a glob of such files, a folder from
`save_to_disk`, or `hf:NAME[:CONFIG]`. All of them become one memory-mapped `datasets` table,
so a corpus may exceed memory and any document is reached in O(1).

The fingerprint is of content: of the documents themselves, not of file names, paths or
formats. The same documents in another file, or in another format, are the same corpus.
Cost: one pass over the corpus at every start, at 100 to 200 MB/s on one core here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import ConfigError, CorpusError

SPLITS = ("paragraph", "line", "file")
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


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
            raise ConfigError(f"--min-chars is {self.min_chars}, but must not be negative")
        if self.limit_docs is not None and self.limit_docs < 1:
            raise ConfigError(f"--limit-docs is {self.limit_docs}, but must be at least 1")
        try:
            re.compile(self.drop or "")
        except re.error as error:
            raise ConfigError(f"--drop {self.drop!r} is not a regular expression: {error}") from None

    def keeps(self, text: str) -> bool:
        """Whether a document of this text stays."""
        return len(text) >= self.min_chars and not (self.drop and re.search(self.drop, text))

    @property
    def looks_at_text(self) -> bool:
        """Whether any filter reads the text."""
        return bool(self.min_chars or self.drop)


class Corpus:
    """Documents by index.

    Attributes:
        form: `text`, `chat` or `tokenised`.
        columns: the columns that documents are made of.
    """

    def __init__(self, table: Any, form: str, columns: tuple[str, ...], filters: Filters,
                 paragraphs: NDArray[np.int64] | None = None) -> None:  # fmt: skip
        self._table = table
        self._filters = filters
        self._paragraphs = paragraphs  # [P, 2] first and past-last line of each, when lines are the rows
        self.form = form
        self.columns = columns
        available = len(table) if paragraphs is None else len(paragraphs)
        self._length = min(available, filters.limit_docs or available)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> list[Any]:
        """Documents `start` to `stop`: texts, conversations, or `(input_ids, labels or None)`.

        Raises:
            CorpusError: text that is not UTF-8.
        """
        if start >= stop:
            return []
        try:
            return self._read(start, stop)
        except UnicodeDecodeError as error:
            raise CorpusError(f"documents {start} to {stop - 1}: a text is not UTF-8 ({error.reason})") from None

    def _read(self, start: int, stop: int) -> list[Any]:
        if self._paragraphs is not None:
            spans = self._paragraphs[start:stop]
            base = int(spans[0, 0])
            lines = self._table[base : int(spans[-1, 1])][self.columns[0]]
            return ["\n".join(lines[a - base : b - base]) for a, b in spans.tolist()]
        batch = self._table[start:stop]
        if self.form == "tokenised":
            labels = batch["labels"] if "labels" in self.columns else [None] * (stop - start)
            return list(zip(batch["input_ids"], labels, strict=True))
        return list(batch[self.columns[0]])

    def keeps(self, number: int, document: Any) -> bool:
        """Whether a document is there and passes the filters."""
        if self.form == "tokenised":
            return document[0] is not None
        if document is None:
            return False
        if self.form == "text" and isinstance(document, str):
            return self._filters.keeps(document)
        if self.form == "chat" and isinstance(document, list) and all(isinstance(m, dict) for m in document):
            return self._filters.keeps("\n".join(str(m.get("content")) for m in document))
        wanted = "text" if self.form == "text" else "a list of messages"
        raise CorpusError(
            f"document {number}: column {self.columns[0]!r} holds {type(document).__name__}, not {wanted}"
        )

    def batches(self, size: int = 1000) -> Iterator[tuple[int, list[Any]]]:
        """All documents in order, `(index of the first, documents)`, unfiltered."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))

    def survey(self) -> tuple[str, int]:
        """`(fingerprint, characters or tokens)` of the documents, unfiltered.

        The fingerprint is the sha256 of the form and of the sha256 of every document in order.

        Raises:
            CorpusError: no document passes the filters.
        """
        digest = hashlib.sha256(self.form.encode())
        size = survivors = 0
        for start, documents in self.batches():
            for offset, document in enumerate(documents):
                kept = self.keeps(start + offset, document)
                survivors += kept
                try:
                    content, length = _content(document, self.form)
                except (TypeError, ValueError) as error:
                    raise CorpusError(f"document {start + offset} cannot be read: {error}") from None
                size += length
                digest.update(hashlib.sha256(content).digest())
        if not survivors:
            raise CorpusError(f"every one of the {len(self)} documents was dropped by the filters")
        return digest.hexdigest(), size


def _content(document: Any, form: str) -> tuple[bytes, int]:
    if document is None:
        return b"\xff", 0  # no text encodes to this
    if form == "text":
        return document.encode("utf-8", "surrogatepass"), len(document)
    if form == "chat":
        text = json.dumps(document, sort_keys=True, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass"), len(text)
    ids, labels = document
    ids = ids or []
    parts = [np.asarray(ids, "<i8").tobytes()] + ([] if labels is None else [b"|", np.asarray(labels, "<i8").tobytes()])
    return b"".join(parts), len(ids)


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
        spec: a path, a glob, or `hf:NAME[:CONFIG]`.
        split: the split to read from `hf:` and from folders that hold several.
        split_text: what one document of a `.txt` file is: a `paragraph` (lines up to a blank
            one), a `line` that is not blank, or the whole `file`.
        text_column: the column of texts, `text` by default.
        messages_column: the column of conversations, `messages` by default.
        filters: documents to leave out.

    Raises:
        CorpusError: nothing there, nothing in it, a missing column, bytes that are not UTF-8.
        ConfigError: an option out of range.
    """
    if split_text not in SPLITS:
        raise ConfigError(f"--split-text {split_text} is not one of {', '.join(SPLITS)}")
    filters = filters or Filters()
    tables, plain_text = _load(spec, split, split_text)
    if plain_text and text_column in (None, "text") and messages_column is None:
        spans = None if split_text == "file" else _spans(tables, split_text)
        corpus = Corpus(_joined(tables), "text", ("text",), filters, spans)
    else:
        table = _joined(tables)
        form, columns = _columns(spec, table, text_column, messages_column)
        if form == "tokenised" and filters.looks_at_text:
            raise ConfigError("--min-chars and --drop read text, but this corpus is already tokenised")
        corpus = Corpus(table.select_columns(list(columns)), form, columns, filters)
    if not len(corpus):
        raise CorpusError(f"the corpus {spec} holds no documents")
    return corpus


def _joined(tables: Sequence[Any]) -> Any:
    """One table of several, its rows plain Python values whatever format it was saved with."""
    import datasets

    return (tables[0] if len(tables) == 1 else datasets.concatenate_datasets(list(tables))).with_format(None)


def _spans(files: Sequence[Any], split_text: str) -> NDArray[np.int64]:
    """First and past-last line of each document, over the lines of all files; none crosses from one to the next."""
    import pyarrow.compute as pc

    starts, stops, base = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for lines in files:
        filled = np.zeros(0, bool)
        for batch in lines.with_format("arrow").iter(100_000):
            text = pc.not_equal(pc.utf8_trim_whitespace(batch["text"]), "")
            filled = np.concatenate([filled, np.asarray(text, bool)])
        edges = np.diff(filled.astype(np.int8), prepend=0, append=0)
        if split_text == "line":
            starts.append(base + np.flatnonzero(filled))
            stops.append(base + np.flatnonzero(filled) + 1)
        else:
            starts.append(base + np.flatnonzero(edges == 1))
            stops.append(base + np.flatnonzero(edges == -1))
        base += len(filled)
    return np.stack([np.concatenate(starts), np.concatenate(stops)], -1)


def _columns(
    spec: str, table: Any, text_column: str | None, messages_column: str | None
) -> tuple[str, tuple[str, ...]]:
    """The form of a table's documents and the columns that they are made of, types checked."""
    form, columns = _named_columns(spec, table.column_names, text_column, messages_column)
    for column in columns:
        kind = table.features.arrow_schema.field(column).type
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
    return form, columns


def _named_columns(
    spec: str, names: Sequence[str], text_column: str | None, messages_column: str | None
) -> tuple[str, tuple[str, ...]]:
    if text_column and messages_column:
        raise ConfigError("--text-column and --messages-column exclude each other")
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
        "(name one with --text-column or --messages-column)"
    )


def _load(spec: str, split: str, split_text: str) -> tuple[list[Any], bool]:
    """The tables of a corpus, in order, and whether they are plain text, a table a file."""
    import datasets

    try:
        if spec.startswith("hf:"):
            name, _, config = spec[3:].partition(":")
            return [datasets.load_dataset(name, config or None, split=split)], False
        if Path(spec).is_dir():
            loaded = datasets.load_from_disk(spec)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise CorpusError(f"the folder {spec} has no split {split!r}; it has {', '.join(loaded)}")
                loaded = loaded[split]
            return [loaded], False
        matches = [spec] if Path(spec).is_file() else glob.glob(spec, recursive=True)  # noqa: PTH207 - absolute too
        files = sorted(f for f in matches if Path(f).is_file())
        if not files:
            raise CorpusError(f"the corpus {spec} does not exist")
        suffixes = {Path(f).suffix for f in files}
        if len(suffixes) > 1 or next(iter(suffixes)) not in _BUILDERS:
            raise CorpusError(
                f"the corpus {spec} must be files of one kind of {', '.join(_BUILDERS)}; it has "
                f"{', '.join(sorted(suffixes)) or 'no suffix'}"
            )
        builder = _BUILDERS[next(iter(suffixes))]
        files = [f for f in files if Path(f).stat().st_size]
        if not files:
            raise CorpusError(f"the corpus {spec} is empty")
        if builder != "text":
            return [datasets.load_dataset(builder, data_files=files, split="train")], False
        options = {"sample_by": "document" if split_text == "file" else "line", "encoding": "utf-8-sig"}
        return [datasets.load_dataset(builder, data_files=[f], split="train", **options) for f in files], True
    except CorpusError:
        raise
    except Exception as error:  # datasets raises what its backends raise; a person needs the reason, not the stack
        raise CorpusError(f"the corpus {spec} cannot be read: {_reason(error)}") from error


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
