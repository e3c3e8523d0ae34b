"""Every form of a corpus, and every way that one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcache.corpus.documents import BadDocument
from kdcache.corpus.forms import Columns
from kdcache.corpus.sources import Corpus, Filters, open_corpus
from kdcache.corpus.survey import survey
from kdcache.errors import ConfigError, CorpusError

TEXTS = ["One.\nStill one.", "Two, with ünïcödé.", "Three is longer than the others are."]


def everything(corpus: Corpus) -> list[Any]:
    return [corpus.document(record) for part in corpus.parts() for record in corpus.read(part)[0]]


def documents(corpus: Corpus, start: int, stop: int) -> list[Any]:
    """Documents of a plan of one document a shard, each shard read by itself."""
    plan = survey(corpus, {"docs_per_shard": 1}).plan
    shards = (corpus.read_shard(plan, shard) for shard in range(start, stop))
    return [corpus.document(record) for shard in shards for _, _, records, _ in shard for record in records]


def refusal(corpus: Corpus) -> str:
    """Why the first record that cannot be used cannot be."""
    with pytest.raises(BadDocument) as caught:
        everything(corpus)
    return str(caught.value)


def fingerprint(corpus: Corpus) -> str:
    return survey(corpus, {"chars_per_shard": 1000}).corpus_sha256


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    table.to_parquet(str(tmp_path / "c.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "c.txt").write_text("\n\n \n".join(TEXTS) + "\n\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))
    (arrow,) = (tmp_path / "disk").glob("*.arrow")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes())
    return {
        "txt": str(tmp_path / "c.txt"),
        "jsonl": str(tmp_path / "c.jsonl"),
        "parquet": str(tmp_path / "c.parquet"),
        "arrow": str(arrow),
        "folder": str(tmp_path / "disk"),
        "splits": str(tmp_path / "splits"),
        "hf": f"hf:{tmp_path / 'hub'}",
        "glob": str(tmp_path / "c.j*l"),
    }


def test_all_forms_give_the_same_documents_and_fingerprint(files: dict[str, str]) -> None:
    found = {}
    for name, spec in files.items():
        corpus = open_corpus(spec)
        assert everything(corpus) == TEXTS, name
        assert documents(corpus, 1, 2) == TEXTS[1:2], name
        found[name] = survey(corpus, {"docs_per_shard": 3})
        assert found[name].plan.characters.tolist() == [sum(map(len, TEXTS))]
    assert len({each.corpus_sha256 for each in found.values()}) == 1
    assert len({each.plan.sha256.tobytes() for each in found.values()}) == 1


def test_the_fingerprint_sees_every_character_and_every_border(tmp_path: Path) -> None:
    def of(*texts: str) -> str:
        path = tmp_path / f"{abs(hash(texts))}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return fingerprint(open_corpus(str(path)))

    assert len({of("ab", "c"), of("a", "bc"), of("abc"), of("c", "ab"), of("ab", "d"), of("ab", "c", "")}) == 6


def test_text_by_line_and_by_file(tmp_path: Path) -> None:
    for name, text in (("a.txt", "x\n\n  \ny\n"), ("b.txt", "z\r\nw")):
        (tmp_path / name).write_bytes(text.encode())
    spec = str(tmp_path / "*.txt")
    assert everything(open_corpus(spec, split_text="line")) == ["x", "y", "z", "w"]
    assert everything(open_corpus(spec, split_text="file")) == ["x\n\n  \ny\n", "z\nw"]
    assert documents(open_corpus(spec, split_text="line"), 2, 4) == ["z", "w"]


def test_a_split_is_chosen(files: dict[str, str]) -> None:
    assert everything(open_corpus(files["splits"], split="test")) == TEXTS[:1]


def test_filters_and_limits(files: dict[str, str]) -> None:
    corpus = open_corpus(files["jsonl"], filters=Filters(min_chars=16, drop="ünï", limit_docs=3))
    assert [corpus.filters.reason(text) for text in everything(corpus)] == ["min-chars", "drop", None]
    assert survey(open_corpus(files["jsonl"], filters=Filters(limit_docs=2)), {"docs_per_shard": 9}).plan.documents == 2


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    assert everything(open_corpus(str(path), columns=Columns(text="answer"))) == ["a"]
    with pytest.raises(CorpusError, match=r"no column 'text'.*it has question, answer"):
        open_corpus(str(path))
    with pytest.raises(CorpusError, match="no column 'body'; it has question, answer"):
        open_corpus(str(path), columns=Columns(text="body"))
    path.write_text(json.dumps({"input_ids": [1, 2], "labels": [-100, 2], "text": "x"}) + "\n")
    corpus = open_corpus(str(path))
    (found,) = everything(corpus)
    assert (corpus.form.name, found.ids.tolist(), found.supervised.tolist()) == ("tokenised", [1, 2], [False, True])
    with pytest.raises(ConfigError, match="already tokenised"):
        open_corpus(str(path), filters=Filters(min_chars=3))


def test_a_document_that_is_null_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    corpus = open_corpus(str(path))
    assert everything(corpus) == ["a", None]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": 3}, "wrong type: the text is a number"),
        ({"messages": "hello"}, "not JSON: messages is text that is not JSON"),
        ({"messages": {"a": 1}}, "not a conversation: it is an object"),
        ({"input_ids": [1.5, 2.0]}, "wrong type: input_ids holds something else than integers"),
        ({"input_ids": ["1"]}, "wrong type: input_ids holds something else than integers"),
        ({"input_ids": 3}, "wrong type: input_ids holds something else than integers"),
        ({"input_ids": [[1]]}, "wrong type: input_ids holds something else than integers"),
        ({"input_ids": [[1], [1, 2]]}, "wrong type: input_ids is a list of lists"),
        ({"input_ids": [1], "labels": "x"}, "wrong type: labels holds something else than integers"),
        ({"input_ids": [1, None, 2]}, "wrong type: input_ids holds a null"),
    ],
    ids=str,
)
def test_columns_of_another_type_are_refused(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert refusal(open_corpus(str(path))) == words
    assert len(fingerprint(open_corpus(str(path)))) == 64  # a bad record is a document all the same


def test_a_table_saved_for_torch_is_read_like_any_other(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    table.set_format("torch")
    table.save_to_disk(str(tmp_path / "d"))
    corpus = open_corpus(str(tmp_path / "d"))
    fingerprint(corpus)
    assert [(each.ids.tolist(), each.supervised) for each in everything(corpus)] == [([1, 2], None), ([3, 4], None)]


def test_paragraphs_end_with_their_file_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfalpha one\nalpha two")
    (tmp_path / "b.txt").write_text("beta one\n\nbeta two\n")
    (tmp_path / "empty.txt").write_text("")
    corpus = open_corpus(str(tmp_path / "*.txt"))
    assert everything(corpus) == ["alpha one\nalpha two", "beta one", "beta two"]
    assert documents(corpus, 1, 3) == ["beta one", "beta two"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("gone.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n \n\n", "holds no documents"),
        ("image.png", b"12", "must be files of one kind"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=words) as caught:
        fingerprint(open_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_bad_filters() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Filters(drop="(")
    with pytest.raises(ConfigError, match="min_chars is -1"):
        Filters(min_chars=-1)
    with pytest.raises(ConfigError, match="limit_docs is 0"):
        Filters(limit_docs=0)
    with pytest.raises(ConfigError, match="split_text 'word' is not"):
        open_corpus("x.txt", split_text="word")
