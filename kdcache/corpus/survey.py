"""The survey: one pass over a corpus, on all cores, that plans the shards of a cache.

Guarantee: the plan is a function of the documents, their files and the rule alone. How the corpus was cut for
reading, and how many processes read it, change nothing.
Method: the corpus is cut into parts of a few megabytes at places where documents begin; a file that has no such places
(it is compressed, or a JSON array) is one part. Processes read them and give back the sha256, length and address of
each document; here they are put in order and divided into shards.
Cost: one read of the corpus; 48 bytes a document on the way; memory for the parts on their way and 68 bytes a shard.

A reader is a Python process that imports this module alone. It is told on its standard input which corpus to open and
which parts to read. Nothing else comes from the process that starts it: no thread, no loaded model, no main module.
"""

from __future__ import annotations

import hashlib
import json
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from kdcache import stopping
from kdcache.corpus.forms import Columns
from kdcache.corpus.plan import Address, Plan
from kdcache.corpus.sources import Corpus, Digests, Part, open_corpus
from kdcache.corpus.text_files import END
from kdcache.errors import ConfigError, CorpusError, KdcacheError
from kdcache.worker import available_cores

_SHARDS_WANTED = 64
_LEAST_CHARS, _MOST_CHARS = 1 << 18, 1 << 24
_WORTH_PROCESSES = 64 << 20
"""Bytes of a corpus below which one process reads it: starting others takes as long as reading this."""

_PART = struct.Struct("<qqq")
_ANSWER = struct.Struct("<q")
"""Documents, -1 where the part cannot be read; then the sha256s, lengths and addresses."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over a corpus found.

    Attributes:
        plan: its shards.
        corpus_sha256: over the form and the sha256 of every document, in order. The same documents in other files, or
            in other shards, have the same.
    """

    plan: Plan
    corpus_sha256: str


def shard_rule(corpus: Corpus, docs_per_shard: int | None = None, chars_per_shard: int | None = None) -> dict[str, int]:
    """What decides where a shard ends.

    By default a shard is closed when it holds a 64th of the bytes of the corpus in characters, but not fewer than
    256 thousand and not more than 16 million: small enough to lose little when one is interrupted, large enough to be
    worth a file.

    Raises:
        ConfigError: both numbers are given, or one is below 1.
    """
    if docs_per_shard is not None and chars_per_shard is not None:
        raise ConfigError("docs_per_shard and chars_per_shard exclude each other")
    for name, value in (("docs_per_shard", docs_per_shard), ("chars_per_shard", chars_per_shard)):
        if value is not None:
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
            return {name: value}
    return {"chars_per_shard": min(max(corpus.total // _SHARDS_WANTED, _LEAST_CHARS), _MOST_CHARS)}


def survey(corpus: Corpus, rule: dict[str, int], processes: int | None = None) -> Survey:
    """Read the whole corpus and plan its shards.

    Args:
        corpus: to read.
        rule: see `shard_rule`.
        processes: that read it; None for one a core, and for only this one where the corpus is small.

    Raises:
        CorpusError: a file that cannot be read, or no documents.
    """
    if processes is None:
        processes = available_cores() if corpus.total >= _WORTH_PROCESSES else 1
    if corpus.filters.limit_docs is not None and corpus.one_unit:
        processes = 1  # others would read whole files
    divider = _Divider(rule)
    content = hashlib.sha256(corpus.form.name.encode())
    left = corpus.filters.limit_docs
    with closing(_digests(corpus, processes)) as found:
        for (file, _, _), digests in found:
            if left is not None and left < len(digests.characters):  # its last documents do not count
                digests = _examine(corpus, (file, int(digests.addresses[0]), int(digests.addresses[left])))
            content.update(digests.sha256)
            divider.add(file, digests)
            left = None if left is None else left - len(digests.characters)
            if left == 0:
                break
    documents = divider.documents
    if not documents:
        raise CorpusError(f"the corpus {corpus.name} holds no documents")
    return Survey(plan=divider.plan(corpus), corpus_sha256=content.hexdigest())


class _Divider:
    """Documents in order, divided into shards.

    Attributes:
        documents: so far.
    """

    def __init__(self, rule: dict[str, int]) -> None:
        self._most_documents, self._most_characters = rule.get("docs_per_shard"), rule.get("chars_per_shard", 0)
        self._rule = rule
        self.documents = 0
        self._done: list[tuple[int, int, int, bytes, Address]] = []
        self._open(0)

    def _open(self, first: int) -> None:
        self._first, self._characters, self._sha256 = first, 0, hashlib.sha256()
        self._start: Address = (0, 0)

    def add(self, file: int, digests: Digests) -> None:
        """Take in the next documents."""
        ends, at, total = np.cumsum(digests.characters), 0, len(digests.characters)
        while at < total:
            before = int(ends[at - 1]) if at else 0
            if self._first == self.documents:
                self._start = file, int(digests.addresses[at])
            if self._most_documents is not None:
                stop = at + self._most_documents - (self.documents - self._first)
            else:
                stop = int(np.searchsorted(ends, before + self._most_characters - self._characters)) + 1
                stop = max(stop, at + 1)
            stop, closed = min(stop, total), stop <= total
            self._sha256.update(digests.sha256[32 * at : 32 * stop])
            self._characters += int(ends[stop - 1]) - before
            self.documents += stop - at
            if closed:
                self._close()
            at = stop

    def _close(self) -> None:
        last, sha256 = self.documents - 1, self._sha256.digest()
        self._done.append((self._first, last, self._characters, sha256, self._start))
        self._open(self.documents)

    def plan(self, corpus: Corpus) -> Plan:
        """All shards; the last holds what is left."""
        if self._first < self.documents:
            self._close()
        first, last, characters, sha256, starts = zip(*self._done, strict=True)
        file, offset = zip(*starts, strict=True)
        return Plan(
            first=np.array(first, np.int64),
            last=np.array(last, np.int64),
            characters=np.array(characters, np.int64),
            sha256=np.frombuffer(b"".join(sha256), np.uint8).reshape(-1, 32),
            file=np.array(file, np.int32),
            offset=np.array(offset, np.int64),
            files=corpus.files,
            reading=corpus.reading,
            rule=self._rule,
        )


_Answers = Generator[tuple[Part, Digests | None], None, None]


def _digests(corpus: Corpus, processes: int) -> Generator[tuple[Part, Digests], None, None]:
    """What a survey keeps of each part, in order."""
    if processes < 2:
        for part in corpus.parts():
            yield part, corpus.examine(part)
        return
    with closing(_read_by(corpus, corpus.parts(units=True), processes)) as answers:
        for part, digests in answers:
            yield part, digests or _examine(corpus, part)  # which tells what is wrong


def _examine(corpus: Corpus, part: Part) -> Digests:
    """What a survey keeps of a part.

    It is read some documents at a time, which keeps memory small and suits a core's own cache; but text at once, which
    is only hashed.
    """
    file, start, stop = part
    if corpus.plain and stop != END:
        return corpus.examine(part)
    found = [corpus.examine(piece) for piece in corpus.parts((file, start), (file, stop))]
    if len(found) == 1:
        return found[0]
    return Digests(
        sha256=b"".join(each.sha256 for each in found),
        characters=np.concatenate([np.zeros(0, np.int64), *(each.characters for each in found)]),
        addresses=np.concatenate([np.zeros(0, np.int64), *(each.addresses for each in found)]),
    )


def _read_by(corpus: Corpus, parts: Iterable[Part], processes: int) -> _Answers:
    """What processes found in each part, in order; None where a part cannot be read."""
    readers: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
    started: list[_Reader] = []

    def examine(part: Part) -> Digests | None:
        reader = readers.get()
        try:
            return reader.examine(part)
        finally:
            readers.put(reader)

    coming: deque[tuple[Part, Future[Digests | None]]] = deque()
    with ThreadPoolExecutor(processes, thread_name_prefix="kdcache-survey") as pool:
        try:
            for _ in range(processes):
                started.append(_Reader(corpus))
                readers.put(started[-1])
            for part in parts:
                coming.append((part, pool.submit(examine, part)))
                if len(coming) >= 4 * processes:
                    first, answer = coming.popleft()
                    yield first, answer.result()
            for first, answer in coming:
                yield first, answer.result()
        finally:
            for _, answer in coming:
                answer.cancel()
            for reader in started:
                reader.close()


class _Reader:
    """A process that reads parts of a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        opening = {
            "spec": corpus.name, "split": corpus.split, "split_text": corpus.split_text,
            "columns": asdict(corpus.columns), "path": sys.path,
        }  # fmt: skip
        code = "import json, sys; told = json.loads(sys.stdin.buffer.readline()); sys.path[:] = told['path']; "
        code += "from kdcache.corpus.survey import serve; serve(told, sys.stdin.buffer, sys.stdout.buffer)"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send(json.dumps(opening).encode() + b"\n")

    def examine(self, part: Part) -> Digests | None:
        """What a survey keeps of a part; None if it cannot be read."""
        assert self._process.stdout is not None
        self._send(_PART.pack(*part))
        answer = self._process.stdout.read(_ANSWER.size)
        if len(answer) < _ANSWER.size:
            return None
        (documents,) = _ANSWER.unpack(answer)
        if documents < 0:
            return None
        data = self._process.stdout.read(48 * documents)
        numbers = np.frombuffer(data, np.int64, offset=32 * documents)
        return Digests(sha256=data[: 32 * documents], characters=numbers[:documents], addresses=numbers[documents:])

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and will not answer
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def serve(told: dict[str, Any], asked: BinaryIO, answers: BinaryIO) -> None:
    """Read the parts that are asked for, until nobody asks: the life of a reader."""
    for number in (signal.SIGINT, *stopping.SIGNALS):
        signal.signal(number, signal.SIG_IGN)  # whoever started this one ends it
    corpus = open_corpus(
        told["spec"], split=told["split"], split_text=told["split_text"],
        columns=Columns(**{**told["columns"], "ignored": tuple(told["columns"]["ignored"])}),
    )  # fmt: skip
    while len(data := asked.read(_PART.size)) == _PART.size:
        try:
            found = _examine(corpus, _PART.unpack(data))
        except KdcacheError:
            answers.write(_ANSWER.pack(-1))
        else:
            answers.write(_ANSWER.pack(len(found.characters)) + found.sha256)
            answers.write(found.characters.tobytes() + found.addresses.tobytes())
        answers.flush()
