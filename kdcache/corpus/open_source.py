"""Open source: from what a user names as a corpus to files of documents that are read by address.

A corpus is a file, a glob, a folder or a URL of files (see `find_files`), a folder from `save_to_disk`, or
`hf:NAME[:CONFIG]`. A data set of the hub whose files are Parquet, Arrow or JSON is read from those files, range by
range; any other is opened by `datasets`, which downloads it and makes a table of it first.

Cost: opening looks at names, sizes and the first records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from kdcache.corpus.find_files import DataFile, find_files, is_url, list_files, local_path
from kdcache.corpus.plan import CorpusFile
from kdcache.corpus.records import Record
from kdcache.corpus.tables import ArrowFiles, ArrowStreams, DatasetTable, ParquetFiles, Table
from kdcache.corpus.text_files import Addresses, TextFiles
from kdcache.errors import CorpusError


class Source(Protocol):
    """Files of documents that are read by address; see `TextFiles` and `Table`.

    Attributes:
        files: their names and sizes.
        total: bytes of all documents, about.
        fills_nulls: whether records have nulls, at any depth, for what their writer never gave.
    """

    files: tuple[CorpusFile, ...]
    total: int
    fills_nulls: bool

    @property
    def plain(self) -> bool:
        """Whether these are files of text, whose documents have no fields."""

    def choose(self, columns: tuple[str, ...]) -> None:
        """Read these columns."""

    def begin(self, file: int) -> int:
        """The address of the first document of a file."""

    def unit(self, file: int, at: int) -> int:
        """The end of what one of several processes reads for itself, from a document on; `END` for all of the file."""

    def cut(self, file: int, at: int) -> int:
        """The end of the documents that are worth one read, from a document on; `at` itself where none follows."""

    def read(self, file: int, start: int, stop: int) -> tuple[list[Record], Addresses]:
        """The documents between two addresses that `begin`, `cut` or `read` gave, and the address of each."""


def open_source(spec: str, split: str, split_text: str) -> tuple[Source, list[str]]:
    """The files of a corpus, and the columns that they have.

    Args:
        spec: a path, glob, folder or URL, or `hf:NAME[:CONFIG]`.
        split: the split to read of `hf:` and of folders from `save_to_disk`.
        split_text: what one document of a plain text file is: `paragraph`, `line` or `file`.

    Raises:
        CorpusError: nothing there, or files that cannot be read.
        ConfigError: a URL that cannot be used.
    """
    if spec.startswith("hf:") and not spec.startswith("hf://"):
        return _open_hub(spec, split)
    if not is_url(spec) and _is_saved(Path(local_path(spec))):
        return _named(DatasetTable(_load_saved(local_path(spec), split), Path(local_path(spec)).name))
    return open_files(spec, find_files(spec), split_text)


def open_files(spec: str, files: tuple[DataFile, ...], split_text: str) -> tuple[Source, list[str]]:
    """Files of one kind, and the columns that they have."""
    kind = files[0].kind
    if kind == "text":
        return TextFiles(files, split_text), ["text"]
    if kind == "parquet":
        return _named(ParquetFiles(files))
    if kind == "arrow":
        mapped = not any(file.remote or file.compression for file in files)
        return _named(ArrowFiles(files) if mapped else ArrowStreams(files))
    records = TextFiles(files, "record")
    names = records.names()
    if not names:
        raise CorpusError(f"the corpus {spec} holds no documents")
    return records, names


def _named(table: Table) -> tuple[Source, list[str]]:
    return table, table.schema.names


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(folder: str, split: str) -> Any:
    import datasets

    loaded = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise CorpusError(f"the folder {folder} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def _open_hub(spec: str, split: str) -> tuple[Source, list[str]]:
    import datasets

    name, _, config = spec[3:].partition(":")
    builder = datasets.load_dataset_builder(name, config or None)
    places = _plain_files(builder, split)
    if places:
        return open_files(spec, list_files(places), "line")
    return _named(DatasetTable(datasets.load_dataset(name, config or None, split=split), spec))


_READERS = {"json": ("field",), "parquet": ("columns", "filters"), "arrow": ()}
"""What `datasets` reads plain files with, and the settings with which it gives something other than the files hold."""


def _plain_files(builder: Any, split: str) -> list[str]:
    """The files of a split, if they are Parquet, Arrow or JSON that `datasets` would read as they are; else none."""
    reader = type(builder).__module__.rpartition(".")[2]
    settings = _READERS.get(reader)
    if settings is None or any(getattr(builder.config, name, None) is not None for name in settings):
        return []
    places = [str(place) for place in (builder.config.data_files or {}).get(split, ())]
    return [] if any("::" in place or place.startswith("zip://") for place in places) else places
