"""Inputs that real people have: each kind of fault that a public report told of, by some inputs of its kind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from kdcache import open_cache
from kdcache.cache import Cache
from kdcache.errors import CorpusError, IncompleteCacheError
from kdcache.rows import IGNORE
from kdcache.teacher.check_data import check_data
from kdcache.teacher.config import CheckOptions, DumpConfig
from kdcache.teacher.dump import dump

pytestmark = pytest.mark.assets

INVITE = "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token + '\n' }}{% endfor %}" + INVITE
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ASKED = [user("Who is he?"), assistant("He is Tom.")]


class Workplace:
    """A folder with corpora, a real teacher, and caches of it."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.teacher = folder, teacher
        self.summary: dict[str, Any] = {}

    def lines(self, records: list[Any], name: str = "corpus.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def cache(self, corpus: Path, template: str = PLAIN, out: str = "cache", **options: Any) -> Cache:
        """The complete cache of a corpus."""
        (self.folder / "template.jinja").write_text(template)
        self.summary = dump(DumpConfig(
            teacher=str(self.teacher), corpus=str(corpus), out=str(self.folder / out), device="cpu",
            chat_template=str(self.folder / "template.jinja"), **{"k": 2, "seq_len": 128, **options},
        ))  # fmt: skip
        return open_cache(str(self.folder / out))


@pytest.fixture
def place(assets: Path, tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, assets / "models/stories260K")


def pieces(cache: Cache) -> dict[int, list[tuple[str, list[str]]]]:
    """By document: the text of each piece, and the runs of it that are taught."""
    tokenizer = cache.load_tokenizer()
    found: dict[int, list[tuple[str, list[str]]]] = {}
    for packed, _ in cache.read_rows(range(len(cache))):
        labels, at = packed.labels(len(packed.tokens)), 0
        for document, length in zip(packed.piece_documents.tolist(), packed.piece_lengths.tolist(), strict=True):
            ids, taught = packed.tokens[at : at + length].tolist(), labels[at : at + length] != IGNORE
            edges = np.flatnonzero(np.diff(taught.astype(int), prepend=0, append=0)) + 1  # labels are the next tokens
            texts = [tokenizer.decode(ids[:stop], skip_special_tokens=False) for stop in [*edges.tolist(), length]]
            runs = [texts[i + 1][len(texts[i]) :] for i in range(0, len(edges), 2)]
            found.setdefault(document, []).append((texts[-1], runs))
            at += length
    return found


def taught(cache: Cache, document: int = 0) -> list[str]:
    return [run for _, runs in pieces(cache)[document] for run in runs]


# A record that cannot be tokenised does not stop a dump for good.


@pytest.mark.parametrize("documents", [60, pytest.param(1200, marks=pytest.mark.long)])
def test_a_bad_record_near_the_end(place: Workplace, documents: int) -> None:
    records = [{"messages": [user(f"What is {i}?"), assistant(f"It is {i}.")]} for i in range(documents)]
    records[-10] = {"messages": [user("Hello?"), user("Is anyone there?"), assistant("Yes.")]}
    corpus = place.lines(records)
    cache = place.cache(corpus, STRICT, docs_per_shard=20)
    assert place.summary["complete"] and len(pieces(cache)) == documents - 1
    assert place.summary["dropped"] == {"refused by the chat template": 1}
    (bad,) = place.summary["bad_records"]
    assert bad["document"] == documents - 10 and "roles must alternate" in bad["reason"]
    assert "corpus.jsonl" in bad["reason"]
    with pytest.raises(CorpusError, match=f"document {documents - 10} cannot be used"):
        place.cache(corpus, STRICT, out="stopped", docs_per_shard=20, on_bad_record="stop")
    options = CheckOptions(
        teacher=str(place.teacher), corpus=str(corpus), chat_template=str(place.folder / "template.jinja"),
        on_bad_record="stop",
    )  # fmt: skip
    with pytest.raises(CorpusError, match=f"document {documents - 10} cannot be used"):
        check_data(options)


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 512]}, "id out of range"),
        ({"text": "One day."}, {"text": "half \ud83d"}, "lone surrogate"),
        ({"messages": ASKED}, {"messages": ASKED[:1]}, "no answer"),
        ({"messages": ASKED}, {"messages": [user([{"type": "image"}]), ASKED[1]]}, "not text"),
        ({"messages": ASKED}, [1, 2], "not an object"),
    ],
)
def test_one_bad_record_of_each_sort(place: Workplace, good: Any, bad: Any, reason: str) -> None:
    cache = place.cache(place.lines([good] * 5 + [bad]), docs_per_shard=2)
    assert place.summary["complete"] and sorted(pieces(cache)) == [0, 1, 2, 3, 4]
    assert place.summary["dropped"] == {reason: 1} and place.summary["bad_records"][0]["document"] == 5


# What a message says is in what the teacher reads.

TRIMS = PLAIN.replace("m['content']", "(m['content'] | trim)")
STRINGS = PLAIN.replace("m['content']", "(m['content'] if m['content'] is string else '')")
PARTS = PLAIN.replace("m['content']", "(m['content'] | map(attribute='text') | join)")


SHAPES_OF_CONTENT: list[Callable[[str], Any]] = [
    lambda text: [{"type": "text", "text": text}],
    lambda text: [text],
    lambda text: text,
    lambda text: [{"type": "input_text", "text": text[:3]}, {"type": "output_text", "text": text[3:]}],
]


@pytest.mark.parametrize("template", [TRIMS, STRINGS, PARTS], ids=["as it is", "strings only", "parts only"])
def test_content_in_parts(place: Workplace, template: str) -> None:
    records = [{"messages": [user(shape("Who is he?")), assistant(shape("He is Tom."))]} for shape in SHAPES_OF_CONTENT]
    found = pieces(place.cache(place.lines(records), template))
    assert len(found) == len(records)
    for (text, runs), in found.values():  # fmt: skip
        assert text.startswith("[user] Who is he?</s>") and runs == ["He is Tom.</s>"] and "type" not in text


def test_content_in_a_field_that_nobody_knows_is_left_out_by_name(place: Workplace) -> None:
    other = {"messages": [{"role": "user", "words": "Who is he?"}, {"role": "assistant", "words": "He is Tom."}]}
    cache = place.cache(place.lines([{"messages": ASKED}, other]))
    assert sorted(pieces(cache)) == [0] and place.summary["dropped"] == {"no content": 1}


CALLS = (
    "{% if tools %}{{ '[tools] ' + (tools | tojson) }}{% endif %}{% for m in messages %}{{ '[' + m['role'] + '] ' + "
    "(m['content'] or '') }}{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + ' ' + "
    "(c['function']['arguments'] | tojson) }}{% endfor %}{{ eos_token }}{% endfor %}" + INVITE
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "add")
]


def calling(arguments: Callable[[Any], Any] = dict, older: bool = False, **content: Any) -> list[dict[str, Any]]:
    made = []
    for given in ({"city": "Town"}, {"a": "1", "b": "2"}):
        function = {"name": "add" if "a" in given else "weather", "arguments": arguments(given)}
        call = {"function_call": function} if older else {"tool_calls": [{"type": "function", "function": function}]}
        messages = [user("Do it."), {"role": "assistant", **content, **call}, {"role": "tool", "content": "done"}]
        made.append({"tools": TOOLS, "messages": [*messages, assistant("It is done.")]})
    return made


def test_calls_of_tools(place: Workplace) -> None:
    null = calling(content=None)
    as_text = [{**record, "tools": json.dumps(record["tools"])} for record in null]
    records = [*null, *calling(), *calling(content=""), *calling(content=None, older=True), *as_text]
    cache = place.cache(place.lines(records), CALLS, seq_len=256)
    found = pieces(cache)
    assert len(found) == len(records) == 10
    for document, ((text, runs),) in found.items():
        assert text.startswith("[tools] [") and '"weather"' in text and '"add"' in text
        call = '<call>add {"a": "1", "b": "2"}</s>' if document % 2 else '<call>weather {"city": "Town"}</s>'
        assert runs == [call, "It is done.</s>"]


def test_calls_of_tools_in_a_table_have_no_arguments_of_other_tools(place: Workplace) -> None:
    """Arrow gives each call the arguments of all, most of them null."""
    path = place.folder / "calls.parquet"
    parquet.write_table(pa.Table.from_pylist(calling(content="")), path)
    assert "null" not in str(pieces(place.cache(path, CALLS, seq_len=256)))
    assert taught(open_cache(str(place.folder / "cache")))[0] == '<call>weather {"city": "Town"}</s>'


THINKS = PLAIN.replace("m['content']", "('<t></t> ' if m['role'] == 'assistant' and loop.last else '') + m['content']")
CLOSES = PLAIN.replace("eos_token", "(eos_token if m['role'] == 'user' or loop.last else '<end>')")
REASONS = PLAIN.replace(
    "m['content']", "('<t>' + m.thinking + '</t>' if m.thinking and loop.last else '') + m['content']"
)


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [(THINKS, "<t></t> ", "</s>"), (CLOSES, "", "</s>"), (REASONS, "<t>Let me see.</t>", "</s>")],
    ids=["thinks", "closes", "reasons"],
)
def test_a_template_that_shows_the_last_turn_otherwise(place: Workplace, template: str, before: str, end: str) -> None:
    thought = {"thinking": "Let me see."} if template is REASONS else {}
    talk = [user("Who is he?"), assistant("He is Tom.", **thought)]
    talk += [user("And she?"), assistant("She is Lily.", **thought)]
    cache = place.cache(place.lines([{"messages": talk}, {"messages": talk[:2]}]), template)
    assert taught(cache) == [f"{before}He is Tom.{end}", f"{before}She is Lily.{end}"]
    assert taught(cache, 1) == [f"{before}He is Tom.{end}"]
    assert place.summary["dropped"] == {}


# A column that says which tokens count is honoured or refused.


def tokens_of(cache: Cache) -> dict[int, tuple[list[int], list[int]]]:
    """By document, which is one piece: its ids, and those that are labels."""
    found = {}
    for packed, _ in cache.read_rows(range(len(cache))):
        labels, at = packed.labels(len(packed.tokens)), 0
        for document, length in zip(packed.piece_documents.tolist(), packed.piece_lengths.tolist(), strict=True):
            here = labels[at : at + length]
            found[document] = packed.tokens[at : at + length].tolist(), here[here != IGNORE].tolist()
            at += length
    return found


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_read(place: Workplace, side: str) -> None:
    texts = [[1, 400, 401, 402, 403], [1, 404]]
    padding = [[0] * (48 - len(ids)) for ids in texts]
    both = list(zip(texts, padding, strict=True))
    records = [
        {"input_ids": pad + ids, "attention_mask": [0] * len(pad) + [1] * len(ids)} if side == "left"
        else {"input_ids": ids + pad, "attention_mask": [1] * len(ids) + [0] * len(pad)}
        for ids, pad in both
    ]  # fmt: skip
    assert tokens_of(place.cache(place.lines(records))) == {0: (texts[0], texts[0][1:]), 1: (texts[1], texts[1][1:])}


@pytest.mark.parametrize("columns", [
    {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 1]}, {"labels": [-100, -100, 402, 403]},
    {"loss_mask": [1, 0, 1, 1], "labels": [-100, 401, 402, 403]},
], ids=lambda columns: "+".join(columns))  # fmt: skip
def test_masks_are_honoured(place: Workplace, columns: dict[str, Any]) -> None:
    ids = [400, 401, 402, 403]
    assert tokens_of(place.cache(place.lines([{"input_ids": ids, **columns}])))[0] == (ids, [402, 403])


@pytest.mark.parametrize("column", ["token_weights", "answer_mask", "position_ids", "seq_lengths"])
def test_columns_that_cannot_be_honoured_are_refused_by_name(place: Workplace, column: str) -> None:
    corpus = place.lines([{"input_ids": [5, 6, 7], column: [1, 1, 1]}])
    with pytest.raises(CorpusError, match=column):
        place.cache(corpus)
    if column == "token_weights":
        assert tokens_of(place.cache(corpus, ignore_columns=column))[0][0] == [5, 6, 7]


# One BOS, whoever writes it.


@pytest.mark.parametrize(("eos", "last"), [("auto", 2), ("always", 2), ("never", 2)])
def test_a_text_that_a_template_has_made_has_one_bos(place: Workplace, eos: str, last: int) -> None:
    cache = place.cache(place.lines([{"text": "<s>[user] Who?</s>[assistant] Tom.</s>"}, {"text": "Tom."}]), eos=eos)
    ids, labels = tokens_of(cache)[0]
    assert ids[0] == 1 and 1 not in ids[1:] and ids[-1] == last and ids.count(2) == 2 and labels == ids[1:]
    plain = tokens_of(cache)[1][0]
    assert plain[0] == 1 and (plain[-1] == 2) == (eos == "always")


def test_a_template_that_begins_with_bos_makes_one(place: Workplace) -> None:
    ids, _ = tokens_of(place.cache(place.lines([{"messages": ASKED}]), "{{ bos_token }}" + PLAIN))[0]
    assert ids.count(1) == 1 and ids[0] == 1
    ids, _ = tokens_of(place.cache(place.lines([{"prompt": "<s>Who?", "completion": " Tom."}]), out="pairs"))[0]
    assert ids.count(1) == 1 and ids[0] == 1


# The clock decides no token, and neither does chance.

DATED = "{{ 'Date: ' + strftime_now('%d %b %Y') + eos_token }}" + PLAIN


def test_a_template_that_says_the_date(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = place.lines([{"messages": [user(f"What is {i}?"), assistant(f"It is {i}.")]} for i in range(8)])
    monkeypatch.setattr("kdcache.teacher.inputs.today", lambda: "2026-02-03")
    halves = {"docs_per_shard": 4}
    with pytest.raises(IncompleteCacheError):
        place.cache(corpus, DATED, worker="0/2", **halves)
    monkeypatch.setattr("kdcache.teacher.inputs.today", lambda: "2026-02-04")
    cache = place.cache(corpus, DATED, **halves)
    assert place.summary["complete"] and cache.manifest.date == "2026-02-03"
    assert all("Date: 03 Feb 2026" in text for found in pieces(cache).values() for text, _ in found)
    tomorrow = place.cache(corpus, DATED, out="tomorrow", **halves)
    assert all("Date: 04 Feb 2026" in text for found in pieces(tomorrow).values() for text, _ in found)


@pytest.mark.parametrize("draws", ["[1, 2] | random", "[[1, 2]] | map('random') | join", "lipsum(n=1)"])
def test_a_template_that_draws_is_refused(place: Workplace, draws: str) -> None:
    with pytest.raises(CorpusError, match="draws random"):
        place.cache(place.lines([{"messages": ASKED}]), "{{ " + draws + " }}" + PLAIN)


# Files as they are published.


def test_files_by_their_names_and_without(place: Workplace) -> None:
    plain = place.lines([{"text": "One day, Lily found a ball."}] * 3)
    data = plain.read_bytes()
    wanted = tokens_of(place.cache(plain))
    listed = json.dumps([json.loads(line) for line in data.splitlines()]).encode()
    for name, content in (
        ("text.jsonl.gz", gzip.compress(data)), ("text.json.gz", gzip.compress(listed)), ("text.JSONL", data),
        ("text", data),
    ):  # fmt: skip
        (place.folder / name).write_bytes(content)
        assert tokens_of(place.cache(place.folder / name, out=f"cache-{name}")) == wanted, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_corpus_that_is_smaller_than_what_it_says_is_resumed(place: Workplace, kind: str) -> None:
    """A second worker finds its shards at places that lie behind the size of the file."""
    path = place.folder / f"same.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"text": ["One day."] * 3000}), path)
    else:
        path.write_bytes(gzip.compress(b'{"text": "One day."}\n' * 3000))
    with pytest.raises(IncompleteCacheError):
        place.cache(path, worker="0/2", docs_per_shard=1500)
    cache = place.cache(path, worker="1/2", docs_per_shard=1500)
    assert cache.manifest.documents == 3000 and place.summary["complete"]
    if kind == "parquet":
        assert path.stat().st_size < 1500


# Nothing but the assistant's words stands in a span.


@pytest.mark.parametrize("before", ["{{ '[system] Be kind.' + eos_token }}", "{{ bos_token + '[system] Be kind.' }}"])
def test_the_assistant_speaks_first(place: Workplace, before: str) -> None:
    talk = [assistant("Hi, I am Tom."), user("Good."), assistant("Ask me.")]
    asked = [{"role": "system", "content": "Be Tom."}, *talk]
    cache = place.cache(place.lines([{"messages": talk}, {"messages": asked}]), before + PLAIN)
    assert taught(cache, 0) == taught(cache, 1) == ["Hi, I am Tom.</s>", "Ask me.</s>"]


# Shapes of records.

SHARED = [{"from": "human", "value": "Who is he?"}, {"from": "gpt", "value": "He is Tom."}]
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ShareGPT": ({"conversations": SHARED}, {}),
    "ShareGPT with a system": ({"conversations": SHARED, "system": "Be kind."}, {}),
    "ShareGPT, named": ({"conversations": SHARED}, {"messages_column": "conversations"}),
    "ShareGPT as messages": ({"messages": SHARED}, {}),
    "Alpaca": ({"instruction": "Who is he?", "input": "", "output": "He is Tom."}, {}),
    "completed messages": ({"prompt": ASKED[:1], "completion": ASKED[1:]}, {}),
    "JSON in a text": ({"messages": json.dumps(ASKED)}, {}),
    "another column": ({"dialogue": ASKED, "messages_n": 2}, {"messages_column": "dialogue"}),
    "a weight": ({"messages": [user("Eh?"), assistant("No idea.", weight=0), *ASKED]}, {}),
    "train": ({"messages": [user("Eh?"), assistant("No idea.", train=False), *ASKED]}, {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_records(place: Workplace, shape: str) -> None:
    record, options = SHAPES[shape]
    cache = place.cache(place.lines([record] * 2), **options)
    assert taught(cache) == ["He is Tom.</s>"] and "[user] Who is he?" in pieces(cache)[0][0][0]


def test_a_prompt_and_a_completion_that_are_texts(place: Workplace) -> None:
    cache = place.cache(place.lines([{"prompt": "Who is he?", "completion": " He is Tom."}]), eos="always")
    assert taught(cache) == [" He is Tom.</s>"]


def test_a_shape_that_nobody_knows_is_refused_with_the_columns_that_it_has(place: Workplace) -> None:
    with pytest.raises(CorpusError, match="it has frage, antwort"):
        place.cache(place.lines([{"frage": "Wer?", "antwort": "Tom."}]))


# No answer is scored without its question.

STORY = " ".join(f"Then number {i} came home." for i in range(60))


def test_a_conversation_longer_than_a_row(place: Workplace) -> None:
    records = [{"messages": [user("Tell me a story."), assistant(STORY)]}] * 3
    cache = place.cache(place.lines(records))
    for found in pieces(cache).values():
        ((text, (run,)),) = found
        assert text.startswith("[user] Tell me a story.") and STORY.startswith(run)
    assert (place.summary["truncated"], place.summary["cut"]) == (3, 0)
    cut = place.cache(place.lines(records), out="cut", overlong="cut")
    assert place.summary["cut"] == 3 and len(pieces(cut)[0]) > 1
    short = place.cache(place.lines([*records, {"messages": ASKED}]), out="dropped", overlong="drop")
    assert place.summary["dropped"] == {"overlong": 3} and list(pieces(short)) == [3]


def test_a_question_longer_than_a_row_leaves_nothing_to_teach(place: Workplace) -> None:
    place.cache(place.lines([{"messages": [user(STORY), assistant("So it was.")]}, {"messages": ASKED}]))
    assert place.summary["dropped"] == {"overlong": 1} and place.summary["truncated"] == 0


def test_a_text_and_a_completion_longer_than_a_row(place: Workplace) -> None:
    place.cache(place.lines([{"text": STORY}] * 2))
    assert (place.summary["cut"], place.summary["truncated"]) == (2, 0)
    cache = place.cache(place.lines([{"prompt": "Tell me.", "completion": " " + STORY}] * 2), out="pairs")
    assert (place.summary["cut"], place.summary["truncated"]) == (0, 2)
    assert all(text.startswith("<s>") and len(found) == 1 for found in pieces(cache).values() for text, _ in found)
