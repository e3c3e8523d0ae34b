"""The survey plans the same shards however it reads; a shard is read alone, and known when its documents are others."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.sources import Corpus, Filters, open_corpus
from kdcache.corpus.survey import shard_rule, survey
from kdcache.corpus.text_files import TextFiles
from kdcache.errors import ConfigError, CorpusError

PIECES = [
    "a",
    "bc",
    "  d",
    " ",
    "\t",
    "\u3000",
    "\u3042\u3044",
    "é\x85",
    "\x1c",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\r\n\r\n",
]


def random_text(seed: int, pieces: int = 400) -> str:
    return "".join(np.random.default_rng(seed).choice(PIECES, pieces))


def oracle(text: str, document: str) -> list[str]:
    """Documents by Python's own universal newlines and `str.strip`."""
    lines = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
    if document == "line":
        return [line for line in lines if line.strip()]
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def shards(corpus: Corpus, rule: dict[str, int], **options: Any) -> list[list[Any]]:
    plan = survey(corpus, rule, **options).plan
    return [
        [d for _, _, found, _ in corpus.read_shard(plan, s) for d in map(corpus.document, found)]
        for s in range(len(plan))
    ]


@pytest.mark.parametrize("document", ["line", "paragraph"])
@pytest.mark.parametrize("seed", range(6))
def test_text_is_cut_where_lines_and_paragraphs_are(
    tmp_path: Path, seed: int, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In reads of any size, from any address, the documents are those of the whole file."""
    texts = [random_text(2 * seed), random_text(2 * seed + 1)]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_bytes((b"\xef\xbb\xbf" if seed % 2 else b"") + text.encode())
    wanted = [d for text in texts for d in oracle(text, document)]
    corpus = open_corpus(str(tmp_path / "*.txt"), split_text=document)
    plans = []
    for step in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(TextFiles, "step", step)
        monkeypatch.setattr("kdcache.corpus.text_files._WINDOW", step)
        for rule in ({"docs_per_shard": 3}, {"chars_per_shard": 10}):
            found = shards(corpus, rule)
            assert [d for shard in found for d in shard] == wanted
            plans.append(survey(corpus, rule))
    assert all(plan.plan == plans[i % 2].plan for i, plan in enumerate(plans))
    assert len({plan.corpus_sha256 for plan in plans}) == 1


def write(folder: Path, form: str, texts: list[str]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path, table = folder / f"c.{form}", pa.table({"n": range(len(texts)), "text": texts})
    if form == "txt":
        path.write_text("\n\n".join(texts))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif form == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif form == "parquet":
        parquet.write_table(table, path, row_group_size=17)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    return str(path)


FORMS = ["txt", "jsonl", "json", "parquet", "arrow"]
TEXTS = [f"Text {n} is this long: {'x' * (n * n % 97)}" for n in range(200)]


@pytest.mark.parametrize("form", FORMS)
def test_processes_change_nothing(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(write(tmp_path, form, TEXTS))
    monkeypatch.setattr(TextFiles, "step", 300)
    alone = survey(corpus, {"chars_per_shard": 500})
    assert len(alone.plan) > 10
    many = survey(corpus, {"chars_per_shard": 500}, processes=3)
    assert many.plan == alone.plan and many.corpus_sha256 == alone.corpus_sha256
    assert [d for shard in shards(corpus, alone.plan.rule) for d in shard] == TEXTS


def test_all_forms_have_the_same_shards(tmp_path: Path) -> None:
    plans = {form: survey(open_corpus(write(tmp_path, form, TEXTS)), {"chars_per_shard": 400}) for form in FORMS}
    assert len({each.corpus_sha256 for each in plans.values()}) == 1
    assert len({each.plan.sha256.tobytes() for each in plans.values()}) == 1
    plan = plans["txt"].plan
    digest = hashlib.sha256(b"".join(hashlib.sha256(TEXTS[n].encode()).digest() for n in range(plan.documents_of(0))))
    assert plan.sha256[0].tobytes() == digest.digest()


def test_shards_are_balanced_by_characters(tmp_path: Path) -> None:
    """Each but the last is closed by the document that takes it to the number asked for."""
    plan = survey(open_corpus(write(tmp_path, "txt", TEXTS)), {"chars_per_shard": 1000}).plan
    for shard in range(len(plan)):
        lengths = [len(TEXTS[n]) for n in range(plan.first[shard], plan.last[shard] + 1)]
        assert plan.characters[shard] == sum(lengths)
        assert sum(lengths[:-1]) < 1000
        assert sum(lengths) >= 1000 or shard == len(plan) - 1
    assert plan.first[0] == 0 and plan.documents == len(TEXTS)


def test_the_default_is_a_64th_within_limits(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path, "txt", TEXTS))
    for total, wanted in ((10, 1 << 18), (64 << 20, 1 << 20), (1 << 40, 1 << 24)):
        corpus._source.total = total
        assert shard_rule(corpus) == {"chars_per_shard": wanted}
    assert shard_rule(corpus, docs_per_shard=4) == {"docs_per_shard": 4}
    for bad in ({"docs_per_shard": 0}, {"chars_per_shard": -1}, {"docs_per_shard": 1, "chars_per_shard": 1}):
        with pytest.raises(ConfigError):
            shard_rule(corpus, **bad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_ends_the_corpus(tmp_path: Path, form: str, processes: int) -> None:
    path = write(tmp_path, form, TEXTS)
    corpus = open_corpus(path, filters=Filters(limit_docs=50))
    found = survey(corpus, {"docs_per_shard": 20}, processes)
    assert found.plan.last.tolist() == [19, 39, 49]
    assert [len(shard) for shard in shards(corpus, found.plan.rule)] == [20, 20, 10]
    short = tmp_path / "short"
    short.mkdir()
    first = survey(open_corpus(write(short, form, TEXTS[:50])), {"docs_per_shard": 20})
    assert found.corpus_sha256 == first.corpus_sha256


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_shard_reads_no_bytes_of_the_others(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, form, TEXTS)
    plan = survey(open_corpus(path), {"docs_per_shard": 20}).plan
    asked: list[tuple[int, int]] = []
    read = TextFiles.read

    def note(self: TextFiles, file: int, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return read(self, file, start, stop)

    monkeypatch.setattr(TextFiles, "read", note)
    corpus = open_corpus(path)
    assert [d for _, _, found, _ in corpus.read_shard(plan, 4) for d in map(corpus.document, found)] == TEXTS[80:100]
    assert asked == [(plan.start(4)[1], plan.start(5)[1])]


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_other_documents_of_the_same_length_are_found_by_their_shard(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form, TEXTS)
    plan = survey(open_corpus(path), {"docs_per_shard": 20}).plan
    changed = [*TEXTS[:85], TEXTS[85].replace("Text", "Tent"), *TEXTS[86:]]
    corpus = open_corpus(write(tmp_path, form, changed))
    for shard in range(len(plan)):
        if shard != 4:
            assert sum(len(found) for _, _, found, _ in corpus.read_shard(plan, shard)) == 20
    with pytest.raises(CorpusError, match=r"the documents of shard 4 in .* are not those"):
        list(corpus.read_shard(plan, 4))


def test_a_file_that_is_garbled_is_named_with_its_shard(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "jsonl", TEXTS))
    corpus = open_corpus(str(path))
    plan = survey(corpus, {"docs_per_shard": 20}).plan
    data = bytearray(path.read_bytes())
    data[plan.start(3)[1]] = ord("[")
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"shard 3 in .* are not those"):
        list(corpus.read_shard(plan, 3))


def test_a_corpus_of_other_files_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n\nof two")
    corpus = open_corpus(str(tmp_path / "*.txt"))
    plan = survey(corpus, {"docs_per_shard": 3}).plan
    plan.require_corpus(corpus.files, corpus.reading, "same")
    (one, two), reading = corpus.files, corpus.reading
    for files, changes, words in (
        ((one,), {}, "it has 1 files, not 2"),
        ((one, dataclasses.replace(two, name="c.txt")), {}, r"it has a file c\.txt where that had b\.txt"),
        ((one, dataclasses.replace(two, size=9)), {}, r"b\.txt has a size of 9, not 14"),
        ((one, two), {"split_text": "line"}, "its split_text is 'line', not 'paragraph'"),
        ((one, two), {"columns": ["body"]}, "its columns is"),
    ):
        with pytest.raises(CorpusError, match=f"the corpus name is not the one .*{words}"):
            plan.require_corpus(files, {**reading, **changes}, "name")


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "txt", TEXTS))
    corpus = open_corpus(str(path))
    path.write_text("short")
    with pytest.raises(CorpusError, match=r"c\.txt ends before byte"):
        survey(corpus, {"docs_per_shard": 3})


def test_conversations_are_the_same_in_any_file(tmp_path: Path) -> None:
    """A table gives every message every key; that is no difference between documents."""
    import datasets

    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]] * 3
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    filled = [[{"name": None, **message} for message in talk] for talk in talks]
    datasets.Dataset.from_dict({"messages": filled}).to_parquet(str(tmp_path / "c.parquet"))
    found = [survey(open_corpus(str(tmp_path / f"c.{form}")), {"docs_per_shard": 3}) for form in ("jsonl", "parquet")]
    assert found[0].corpus_sha256 == found[1].corpus_sha256


HELD = {
    "plain.txt": b"one\ntwo\n\nthree\n",
    "mark.txt": b"\xef\xbb\xbfone\n\ntwo",
    "beyond-ascii.txt": "zwölf\n\n\u2003\n\nπ < 4, 🦆\n".encode(),
    "returns.txt": b"one\r\n\r\ntwo\rthree\n",
    "blank.txt": b"\n\n \n\none\n",
    "plain.jsonl": b'{"text": "one"}\n{"text": ""}\n{"other": 1, "text": "a\\nb"}',
    "beyond-ascii.jsonl": '{"text": "zwölf \\u00e4 🦆"}\n'.encode(),
    "null.jsonl": b'{"text": "one"}\n{"text": null}\n{"other": 1}\n',
    "blank.jsonl": b'{"text": "one"}\n\n  \n{"text": "two"}\r\n',
    "repeated.jsonl": b'{"text": "one", "text": "two"}\n',
}


@pytest.mark.parametrize("split_text", ["paragraph", "line", "file"])
@pytest.mark.parametrize("name", HELD)
def test_texts_that_are_never_held_have_the_digests_of_those_that_are_read(
    name: str, split_text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(HELD[name])
    corpus = open_corpus(str(tmp_path / name), split_text=split_text)
    read = [corpus.document(record) for part in corpus.parts() for record in corpus.read(part)[0]]
    examined = [corpus.examine(part) for part in corpus.parts()]
    contents = [b"\xff" if text is None else text.encode() for text in read]
    assert b"".join(found.sha256 for found in examined) == b"".join(hashlib.sha256(c).digest() for c in contents)
    assert [n for found in examined for n in found.characters] == [len(text or "") for text in read]
    starts = [address for part in corpus.parts() for address in corpus.read(part)[1]]
    assert [at for found in examined for at in found.addresses] == starts
