"""Find files: from the path, glob, folder or URL that names a corpus to its files, in order, each with its kind.

A kind is what a file holds: `text`, `records` (JSON), `parquet` or `arrow`. Its suffix says it, whatever the case, with
or without the suffix of a compression behind it; a file without a suffix is looked at. All files of a corpus are of one
kind. Of a folder or a glob, hidden files (`.name`, `_name`), empty ones, files with other suffixes and those that lie
beside data (README, LICENSE, the records of `datasets`) are left out; files without a suffix count only where no other
does. A file that is named by itself is read or refused.

Cost: one listing, and one look at each file without a suffix.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.corpus.file_bytes import DecompressedFile, FileBytes, LocalFile, RemoteFile
from kdcache.corpus.plan import CorpusFile
from kdcache.errors import CorpusError

KINDS = {
    ".txt": "text", ".jsonl": "records", ".ndjson": "records", ".json": "records", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*["}]')
_LOOK = 1 << 12
GENERATED = "kdcache-corpus.json"
"""What lies beside the files of a generated corpus, and says who wrote them (`kdcache.generated_corpus`)."""

_BESIDE = re.compile(
    r"(readme|license|licence|notice|citation|changelog|contributing)(\.\w+)?|"
    r"(dataset_infos?|dataset_dict|state|kdcache-corpus)\.json",
    re.IGNORECASE,
)
_SPLITS = re.compile(r"(?<![a-z0-9])(train|test|validation|valid|val|dev|eval)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a corpus.

    Attributes:
        path: of a local file, or its URL.
        size: bytes, as it lies there.
        kind: `text`, `records`, `parquet` or `arrow`.
        compression: `gzip`, `zstd`, `bz2`, `xz`, or None.
        fs, inside: the file system behind a URL and the path in it; None for a local file.
    """

    path: str
    size: int
    kind: str
    compression: str | None = None
    fs: Any = None
    inside: str = ""

    @property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return self.fs is not None

    @property
    def lines(self) -> bool:
        """Whether its name says that each line is a record."""
        return _suffixes(self.path)[0] in (".jsonl", ".ndjson")

    def open(self) -> FileBytes:
        """Its bytes, decompressed."""
        inner = (
            RemoteFile(self.fs, self.inside, self.path, self.size) if self.remote else LocalFile(self.path, self.size)
        )
        return DecompressedFile(inner, self.compression) if self.compression else inner


def is_url(spec: str) -> bool:
    """Whether a corpus is named by a URL, and not by a path of this machine."""
    return "://" in spec and not spec.startswith("file://")


def local_path(spec: str) -> str:
    """The path that a `file://` URL names, or the path itself."""
    return spec.removeprefix("file://")


def find_files(spec: str) -> tuple[DataFile, ...]:
    """The files that a path, glob, folder or URL names, in order of their names; empty ones left out.

    Raises:
        CorpusError: none, files of several kinds or splits, or a file that cannot be read.
        ConfigError: a URL that cannot be used.
    """
    found, one = _find_remote(spec) if is_url(spec) else _find_local(local_path(spec))
    files = _with_kinds(spec, sorted(found, key=lambda file: file.path), one)
    if not files:
        how = "is empty" if found and not any(file.size for file in found) else "holds no files of data"
        raise CorpusError(f"the corpus {spec} {how}" if found else f"the corpus {spec} does not exist")
    _require_one_kind(spec, files)
    if not one and "*" not in spec:
        _require_one_split(spec, files)
    return files


def list_files(places: Sequence[str]) -> tuple[DataFile, ...]:
    """Some files by their paths or URLs, in this order; empty ones left out. One listing for each folder at a URL.

    Raises:
        CorpusError: files of several kinds, none that holds anything, or one that cannot be read.
        ConfigError: a URL that cannot be used.
    """
    listed: dict[str, dict[str, _Found]] = {}
    found = []
    for place in places:
        folder = posixpath.dirname(place)
        if is_url(place) and folder not in listed:
            listed[folder] = {each.path: each for each in _find_remote(folder)[0]}
        if not is_url(place):
            found += _find_local(local_path(place))[0]
        elif place in listed[folder]:
            found.append(listed[folder][place])
        else:  # written in another way than the listing writes it
            found += _find_remote(place)[0]
    files = _with_kinds(places[0], found, True)
    if not files:
        raise CorpusError(f"the corpus {places[0]} is empty")
    _require_one_kind(places[0], files)
    return files


def names_of(files: Iterable[DataFile]) -> tuple[CorpusFile, ...]:
    """Names relative to the folder that the files have in common, and sizes."""
    files = tuple(files)
    join, parent = (posixpath, posixpath.dirname) if files[0].remote else (os.path, os.path.dirname)
    base = join.commonpath([parent(_place(file)) for file in files])
    return tuple(
        CorpusFile(name=join.relpath(_place(file), base or ".").replace(os.sep, "/"), size=file.size) for file in files
    )


def _place(file: DataFile) -> str:
    return file.inside if file.remote else file.path


@dataclass(frozen=True)
class _Found:
    """A file, before anyone knows its kind; `open` reads it as it lies there."""

    path: str
    size: int
    below: str
    fs: Any = None
    inside: str = ""

    def of(self, kind: str, compression: str | None) -> DataFile:
        return DataFile(
            path=self.path, size=self.size, kind=kind, compression=compression, fs=self.fs, inside=self.inside
        )


def _find_local(path: str) -> tuple[list[_Found], bool]:
    if Path(path).is_file():
        return [_Found(path, Path(path).stat().st_size, Path(path).name)], True
    if Path(path).is_dir():
        names = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]  # noqa: PTH118
        below: Callable[[str], str] = lambda name: os.path.relpath(name, path)  # noqa: E731
    else:
        fixed = os.path.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])  # noqa: PTH120 - keeps what is written
        names = glob.glob(path, recursive=True)  # noqa: PTH207 - absolute too
        below = lambda name: os.path.relpath(name, fixed or ".")  # noqa: E731
    return [_Found(n, Path(n).stat().st_size, below(n)) for n in names if Path(n).is_file()], False


def _find_remote(url: str) -> tuple[list[_Found], bool]:
    from kdcache.file_systems import connect

    fs, path = connect(url)

    def found(inside: str, info: dict[str, Any], below: str) -> _Found:
        if info.get("size") is None:
            raise CorpusError(f"the server of {fs.unstrip_protocol(inside)} does not tell its size; download it first")
        return _Found(str(fs.unstrip_protocol(inside)), int(info["size"]), below, fs, inside)

    try:
        if "*" in path or (("?" in path or "[" in path) and not url.startswith("http")):
            listed, base = fs.glob(path, detail=True), posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0]) + "/"
            return [found(p, i, p.removeprefix(base)) for p, i in listed.items() if i["type"] == "file"], False
        info = fs.info(path)
        if info["type"] == "file":
            return [found(path, info, posixpath.basename(path.partition("?")[0]))], True
        listed, base = fs.find(path, detail=True), path.rstrip("/") + "/"
        return [found(p, i, p.removeprefix(base)) for p, i in listed.items() if not p.endswith("/")], False
    except FileNotFoundError:
        return [], False


def _suffixes(path: str) -> tuple[str, str]:
    """The suffix that says the kind of a file, and that of its compression, in small letters; empty where none is."""
    name = posixpath.basename(path.partition("?")[0] if "://" in path else path.replace(os.sep, "/")).lower()
    stem, outer = os.path.splitext(name)  # noqa: PTH122 - of a name
    if outer not in COMPRESSIONS:
        stem, outer = name, ""
    suffix = os.path.splitext(stem)[1]  # noqa: PTH122 - of a name
    return ("" if re.match(r"\.\d", suffix) else suffix), outer  # `part.00001` has none


def _with_kinds(spec: str, found: list[_Found], one: bool) -> tuple[DataFile, ...]:
    """The files of a corpus among those found, with their kinds."""
    if not one:
        found = [f for f in found if not re.search(r"(^|/)[._]", f.below.replace(os.sep, "/"))]
        found = [f for f in found if not _BESIDE.fullmatch(posixpath.basename(f.below.replace(os.sep, "/")))]
    named = [f for f in found if _suffixes(f.path)[0] in KINDS]
    bare = [f for f in found if not _suffixes(f.path)[0]]
    if found and not (named or bare):
        others = sorted({_suffixes(f.path)[0] for f in found})
        raise CorpusError(
            f"the corpus {spec} must be files of one kind of {', '.join(KINDS)}, compressed as "
            f"{', '.join(COMPRESSIONS)} or not; it has {', '.join(others[:5])}"
        )
    files = []
    for file in named or bare:
        if not file.size:
            continue
        suffix, outer = _suffixes(file.path)
        kind, compression = (KINDS[suffix], COMPRESSIONS.get(outer)) if suffix else _look(file)
        if kind == "parquet" and compression:
            raise CorpusError(f"the corpus file {file.path} is Parquet inside {compression}; decompress it first")
        files.append(file.of(kind, compression))
    return tuple(files)


def _look(file: _Found) -> tuple[str, str | None]:
    """Kind and compression of a file by its first bytes."""
    start = file.of("text", None).open().read(0, _LOOK)
    compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if compression:
        start = file.of("text", compression).open().read(0, _LOOK)
    kind = next((name for magic, name in _TABLES.items() if start.startswith(magic)), None)
    if kind is None and b"\0" in start:
        raise CorpusError(f"the corpus file {file.path} has no suffix, and does not look like text, JSON or a table")
    return kind or ("records" if _JSON.match(start) else "text"), compression


def _require_one_kind(spec: str, files: tuple[DataFile, ...]) -> None:
    for file in files:
        if file.kind != files[0].kind:
            raise CorpusError(
                f"the corpus {spec} has files of several kinds, {files[0].path} ({files[0].kind}) and {file.path} "
                f"({file.kind}); name those of one kind, as in {_glob_of(spec, file)}"
            )


def _require_one_split(spec: str, files: tuple[DataFile, ...]) -> None:
    """Refuse a folder that holds what models are tested with beside what they are trained with."""
    base = len(local_path(spec))
    first: dict[bool, DataFile] = {}
    for file in files:
        words = {word.lower() for word in _SPLITS.findall(file.path[base:])}
        if words:
            first.setdefault("train" in words, file)
    if len(first) == 2:
        raise CorpusError(
            f"the corpus {spec} has files of several splits, {first[True].path} and {first[False].path}; name those to "
            f"read, as in {spec.rstrip('/')}/**/*train*"
        )


def _glob_of(spec: str, file: DataFile) -> str:
    folder = spec.rstrip("/") if "*" not in spec else posixpath.dirname(spec.partition("*")[0]) or "."
    return f"{folder}/**/*{''.join(_suffixes(file.path))}"
