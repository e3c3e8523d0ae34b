"""What a teacher reads that its student does not: from records to prefixes, and how pieces leave it room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.documents import BadDocument
from kdcache.corpus.forms import Columns
from kdcache.corpus.packing import Tokens, pack
from kdcache.corpus.sources import open_corpus
from kdcache.corpus.teacher_context import prefix_of
from kdcache.corpus.tokenise import Tokeniser
from kdcache.errors import CorpusError
from kdcache.prefixes import Prefix
from tests.making import make_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SECRET = "Foxes are never sad."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    found.chat_template = CHAT
    return found


def read(tokenizer: Any, folder: Path, *records: dict[str, Any], system: str | None = None) -> list[Tokens]:
    """The sequences of the last record; why it cannot be used is raised."""
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = open_corpus(str(path))
    documents = [corpus.document(record) for record in corpus.read(next(corpus.parts()))[0]]
    assert documents[-1] is not None
    (found,) = Tokeniser(tokenizer, 320, teacher_system=system).tokenise([(0, documents[-1])])
    if isinstance(found, BadDocument):
        raise found
    return found


def teacher_text(tokenizer: Any, tokens: Tokens) -> str:
    assert tokens.prefix is not None
    return str(tokenizer.decode([*tokens.prefix.tokens, *tokens.ids[tokens.prefix.replaced :]]))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [message("user", "how many?"), message("assistant", "four of them")]


@pytest.mark.parametrize(
    ("record", "system", "expected"),
    [
        ({"text": "the fox"}, SECRET, f"<s>{SECRET}the fox</s>"),
        ({"text": "the fox", "teacher_prompt": "A hint: "}, None, "<s>A hint: the fox</s>"),
        ({"text": "the fox", "teacher_prompt": "A hint: "}, SECRET, f"<s>{SECRET}A hint: the fox</s>"),
        ({"text": "the fox", "teacher_prompt": ""}, None, None),
        ({"prompt": "who?", "completion": " the fox", "teacher_prompt": "the answer is fox. who?"}, None,
         "<s>the answer is fox. who? the fox</s>"),
        ({"prompt": "who?", "completion": " the fox"}, SECRET, f"<s>{SECRET}who? the fox</s>"),
        ({"input_ids": [0, 10, 11, 12]}, "A", "<s>A)*+"),
        ({"input_ids": [10, 11, 12]}, "A", "A)*+"),
        ({"messages": ASKED}, SECRET, f"<system>{SECRET}\n<user>how many?\n<assistant>four of them\n"),
        ({"messages": [message("system", "Be kind."), *ASKED]}, SECRET,
         f"<system>{SECRET}\n\nBe kind.\n<user>how many?\n<assistant>four of them\n"),
        ({"messages": ASKED, "teacher_messages": [message("user", "Foxes? 4.")]}, None,
         "<user>Foxes? 4.\n<assistant>four of them\n"),
        ({"messages": ASKED, "teacher_messages": [message("user", "1"), message("assistant", "one"), *ASKED]}, SECRET,
         f"<system>{SECRET}\n<user>1\n<assistant>one\n<user>how many?\n<assistant>four of them\n"),
        ({"prompt": ASKED[:1], "completion": ASKED[1:], "teacher_prompt": [message("user", "Foxes? 4.")]}, None,
         "<user>Foxes? 4.\n<assistant>four of them\n"),
        ({"instruction": "count", "output": "four", "teacher_messages": [message("user", "it is 4")]}, None,
         "<user>it is 4\n<assistant>four\n"),
    ],
    ids=str,
)  # fmt: skip
def test_a_teacher_reads_its_own_context_and_then_what_its_student_reads(
    tokenizer: Any, tmp_path: Path, record: dict[str, Any], system: str | None, expected: str | None
) -> None:
    (tokens,) = read(tokenizer, tmp_path, record, system=system)
    if expected is None:
        assert tokens.prefix is None
        return
    assert teacher_text(tokenizer, tokens) == expected
    supervised = np.arange(len(tokens.ids)) > 0 if tokens.supervised is None else tokens.supervised
    assert tokens.prefix is not None and not supervised[1 : tokens.prefix.replaced].any()
    without = {name: value for name, value in record.items() if not name.startswith("teacher")}
    (plain,) = read(tokenizer, tmp_path, without)
    assert plain.ids.tolist() == tokens.ids.tolist() and plain.prefix is None  # the student is given none of it


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": ASKED, "teacher_messages": [message("user", "?"), message("assistant", "five of them")]},
         "teacher reads other answers: .* from token"),
        ({"messages": ASKED, "teacher_messages": [*ASKED[1:], message("assistant", "more")]}, "teacher"),
        ({"messages": ASKED, "teacher_messages": []}, "teacher_messages: it is an empty list"),
        ({"messages": ASKED, "teacher_messages": [{"content": "?"}]}, "teacher_messages: .* message 0 has no role"),
        ({"messages": ASKED, "teacher_messages": 3}, "a number"),
        ({"text": "the fox", "teacher_prompt": 3}, "wrong type: the teacher_prompt is a number"),
        ({"prompt": "", "completion": "the fox", "teacher_messages": ASKED}, "no place for teacher_messages"),
        ({"prompt": ASKED[:1], "completion": ASKED[1:], "teacher_prompt": ASKED[:1], "teacher_messages": ASKED},
         "two teacher contexts"),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_tells_the_teacher_something_else_is_left_out(
    tokenizer: Any, tmp_path: Path, record: dict[str, Any], match: str
) -> None:
    with pytest.raises(BadDocument, match=match):
        read(tokenizer, tmp_path, record)


def test_columns_that_say_what_a_teacher_reads(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'teacher_messages', which does not go with .* text; give teacher_prompt"):
        read(tokenizer, tmp_path, {"text": "a", "teacher_messages": ASKED})
    with pytest.raises(
        CorpusError, match=r"'teacher_prompt', which does not go with .* tokenised; only teacher_system"
    ):
        read(tokenizer, tmp_path, {"input_ids": [1, 2], "teacher_prompt": "a"})
    path = tmp_path / "ignored.jsonl"
    path.write_text(json.dumps({"text": "a", "teacher_messages": ASKED}))
    assert not open_corpus(str(path), columns=Columns(ignored=("teacher_messages",))).form.tells_teacher


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": ASKED}, {"teacher_messages": ASKED}),
        ({"text": "the fox"}, {"teacher_prompt": "a hint"}),
        ({"prompt": "the", "completion": " fox"}, {"teacher_prompt": "a hint"}),
        ({"input_ids": [1, 2]}, {"teacher_prompt": "a hint"}),
    ],
    ids=["chat", "text", "completion", "tokenised"],
)
def test_a_context_that_only_later_records_have_is_not_overlooked(
    tmp_path: Path, record: dict[str, Any], told: dict[str, Any]
) -> None:
    for name, more in (("a", {}), ("b", told), ("c", dict.fromkeys(told))):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**record, **more}) + "\n")
    corpus = open_corpus(str(tmp_path))
    assert len({corpus.examine(part).sha256 for part in corpus.parts()}) < 3
    first, second, third = (corpus.read(part)[0][0] for part in corpus.parts())
    assert corpus.document(first) is not None and corpus.document(third) is not None
    with pytest.raises(BadDocument, match=f"late teacher context: the first records have no {next(iter(told))}"):
        corpus.document(second)


def test_what_a_teacher_is_told_is_a_part_of_the_document(tmp_path: Path) -> None:
    """Otherwise a dump would go on with other hints, and nobody would see it."""
    digests = []
    for name, hint in (("a", "one"), ("b", "two"), ("c", None)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"text": "first", "teacher_prompt": "x"}) + "\n")
        with path.open("a") as file:
            file.write(json.dumps({"text": "the fox", "teacher_prompt": hint}) + "\n")
        corpus = open_corpus(str(path))
        digests.append(corpus.examine(next(corpus.parts())).sha256)
    assert len(set(digests)) == 3 and len({one[:32] for one in digests}) == 1


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def test_the_longest_common_end_against_a_search() -> None:
    """Few different tokens, so that ends are alike by chance, too."""
    random = np.random.default_rng(0)
    for _ in range(300):
        student, teacher = (random.integers(0, 2, random.integers(1, 7)).astype(np.int32) for _ in range(2))
        supervised = random.random(len(student)) < 0.3
        common = max(n for n in range(min(len(student), len(teacher)) + 1)
                     if student[len(student) - n :].tolist() == teacher[len(teacher) - n :].tolist())  # fmt: skip
        labels = np.flatnonzero(supervised[1:]) + 1
        # a label at t is the teacher's distribution behind the tokens before it, of which there must be one
        fits = all(len(student) - t <= common and len(teacher) - (len(student) - t) >= 1 for t in labels)
        if not fits:
            with pytest.raises(BadDocument, match="teacher reads"):
                prefix_of(student, supervised, teacher)
            continue
        prefix = prefix_of(student, supervised, teacher)
        assert [*prefix.tokens, *student[prefix.replaced :]] == teacher.tolist()
        assert len(student) - prefix.replaced == common


def told(length: int, prefix: int, document: int = 0, **more: Any) -> Tokens:
    """A document whose BOS the teacher reads before its own context."""
    made = Prefix(tokens=np.arange(prefix, dtype=np.int32) + 1000 * document, replaced=1)
    return Tokens(document=document, ids=np.arange(length, dtype=np.int32), prefix=made, **more)


def test_every_piece_has_the_whole_context_in_front_and_fits_the_teacher() -> None:
    packed = pack([told(20, 5)], 8, teacher_seq_len=12)
    assert packed.cut == 1 and not packed.dropped
    pieces = [(row.tokens.tolist(), row.prefix(0)) for row in packed.rows]
    assert [tokens for tokens, _ in pieces] == [list(range(7)), list(range(7, 14)), list(range(14, 20))]
    assert [prefix.replaced for _, prefix in pieces] == [1, 0, 0]
    for tokens, prefix in pieces:
        assert prefix.tokens.tolist() == list(range(5))
        assert len(prefix.tokens) + len(tokens) - prefix.replaced <= 12


@pytest.mark.parametrize(
    ("document", "overlong", "expected"),
    [
        (told(8, 5), "auto", (1, 0, {})),  # 5 + 7 fit
        (told(8, 6), "auto", (2, 1, {})),  # 6 + 7 do not: it is cut
        (told(8, 6), "truncate", (1, 0, {})),
        (told(8, 6), "drop", (0, 0, {"teacher-overlong": 1})),
        (told(9, 0), "drop", (0, 0, {"overlong": 1})),
        (told(8, 11), "auto", (0, 0, {"teacher-overlong": 1})),
        (told(8, 400), "auto", (0, 0, {"teacher-overlong": 1})),
        (told(8, 400), "truncate", (0, 0, {"teacher-overlong": 1})),
        (told(1, 400), "auto", (0, 0, {"too-short": 1})),
        (told(8, 6, whole=True, supervised=np.arange(8) > 6), "auto", (0, 0, {"teacher-overlong": 1})),
        (told(8, 6, whole=True, supervised=np.arange(8) > 5), "auto", (1, 0, {})),
    ],
)
def test_a_context_is_never_dropped_silently(
    document: Tokens, overlong: str, expected: tuple[int, int, dict[str, int]]
) -> None:
    packed = pack([document], 8, overlong=overlong, teacher_seq_len=12)
    assert (sum(len(row.piece_lengths) for row in packed.rows), packed.cut, packed.dropped) == expected
    for row in packed.rows:
        for piece, length in enumerate(row.piece_lengths.tolist()):
            prefix = row.prefix(piece)
            assert prefix.tokens.tolist() == document.prefix.tokens.tolist()  # type: ignore[union-attr]
            assert len(prefix.tokens) + length - prefix.replaced <= 12


def test_rows_stay_dense_and_their_prefixes_bounded() -> None:
    """One prefix for all costs a row nothing; a row takes no more different ones than a reader allows."""
    same = [told(4, 12, document=0) for _ in range(32)]
    assert len(pack(same, 32, teacher_seq_len=32).rows) == 4
    other = pack([told(2, 30, document=number) for number in range(32)], 32, teacher_seq_len=32).rows
    assert [len(row.piece_lengths) for row in other] == [8, 8, 8, 8]  # 8 of 30 tokens are within 8 x 32, 9 are not
    assert all(row.prefixes is not None and len(row.prefixes.tokens) <= 8 * 32 for row in other)
