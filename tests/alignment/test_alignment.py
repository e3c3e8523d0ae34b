"""Two tokenisations of one text: shared bytes, the targets at them, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdcache.alignment.chunks import chunks_of
from kdcache.alignment.retokenise import Retokeniser, UnencodableError
from kdcache.alignment.vocabulary import Vocabularies, match_vocabularies
from kdcache.errors import ModelError
from kdcache.token_bytes import TokenBytes
from tests.corpus.tokenizers_of_kinds import KINDS, make, permuted

TEXT = "He is Tom.  The naïve café 漢字 🙂\n\n\tdef f(x): [user] <|endoftext|>, surely"


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: make(kind) for kind in KINDS}


def retokeniser(teacher: Any, student: Any) -> tuple[Retokeniser, Vocabularies]:
    bytes_ = TokenBytes(teacher), TokenBytes(student)
    vocabularies = match_vocabularies(teacher, student, *bytes_)
    return Retokeniser(teacher, student, *bytes_, vocabularies), vocabularies


def spelled(tokenizer: Any, tokens: Any) -> list[bytes | None]:
    bytes_ = TokenBytes(tokenizer)
    return [bytes_.text(int(token)) for token in tokens]


def joined(parts: list[bytes | None]) -> bytes:
    return b"".join(b"|" if part is None else part for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_the_text(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    bytes_ = TokenBytes(tokenizer)
    bytes_.require_exact(kind)
    found = joined(spelled(tokenizer, tokenizer(TEXT, add_special_tokens=False)["input_ids"]))
    assert found == (b" " if bytes_.prefixed else b"") + TEXT.encode()
    assert bytes_.prefixed == (kind in ("gpt2-prefix", "llama2"))
    ids = np.array(tokenizer("<s>" + TEXT, add_special_tokens=False)["input_ids"])
    lengths = bytes_.of_labels(ids[1:], ids[:-1], np.arange(len(ids) - 1))
    assert lengths.sum() == len(TEXT.encode())  # also where a space was put in front


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)))
def test_chunks_hold_the_same_bytes(tokenizers: dict[str, Any], one: str, other: str) -> None:
    teacher, student = tokenizers[one], tokenizers[other]
    tokens = np.array([0 if one != "llama2" else 1, *teacher(TEXT, add_special_tokens=False)["input_ids"], 1])
    tokens[0], tokens[-1] = teacher.bos_token_id, teacher.eos_token_id
    piece = retokeniser(teacher, student)[0].piece(tokens)
    assert piece.tokens[0] == student.bos_token_id and piece.tokens[-1] == student.eos_token_id
    theirs, ours = spelled(teacher, tokens), spelled(student, piece.tokens)
    for side, tokenizer in ((theirs, teacher), (ours, student)):
        if TokenBytes(tokenizer).prefixed:
            side[1] = (side[1] or b"").removeprefix(b" ")
    assert joined(theirs) == joined(ours) == b"|" + TEXT.encode() + b"|"
    chunks = chunks_of(piece)
    cut = {len(joined(theirs[:i])) for i in range(1, len(theirs) + 1)}
    cut &= {len(joined(ours[:i])) for i in range(1, len(ours) + 1)}
    assert len(chunks.size) == len(cut) - 1  # every shared byte begins one, but the end
    for (a, b), (c, d), size in zip(chunks.teacher, chunks.student, chunks.size, strict=True):
        assert joined(theirs[a:b]) == joined(ours[c:d])
        assert size == sum(len(part) for part in theirs[a:b] if part is not None)
    assert chunks.student[0, 0] == 1 and chunks.student[-1, 1] == len(ours)  # behind the first token, to the last


def test_a_piece_that_was_cut_in_a_character_loses_those_bytes(tokenizers: dict[str, Any]) -> None:
    teacher, student = tokenizers["gpt2"], tokenizers["llama2"]
    whole = np.array(teacher("é漢 Tom é漢", add_special_tokens=False)["input_ids"])
    assert [len(part or b"") for part in spelled(teacher, whole)][:2] == [1, 1]  # a byte a token
    piece = retokeniser(teacher, student)[0].piece(whole[1:-1])
    assert joined(spelled(student, piece.tokens)).decode() == " 漢 Tom é"
    chunks = chunks_of(piece)
    assert len(chunks.size) and (chunks.student[:, 0] > 0).all()
    with pytest.raises(UnencodableError, match=r"cannot encode b'.*', which is no text"):
        retokeniser(teacher, student)[0].piece(np.concatenate([whole[6:9], whole[1:2], whole[6:9]]))


def test_vocabularies_match_by_bytes_and_special_tokens_by_name(tokenizers: dict[str, Any]) -> None:
    gpt2, llama2 = tokenizers["gpt2"], tokenizers["llama2"]
    _, vocabularies = retokeniser(llama2, gpt2)
    mine, theirs = llama2.get_vocab(), gpt2.get_vocab()
    ids = vocabularies.ids
    assert ids[mine["<s>"]] == theirs["<s>"] and ids[mine["<|im_end|>"]] == theirs["<|im_end|>"]
    assert ids[mine["▁is"]] == theirs["Ġis"] and ids[mine["e"]] == theirs["e"]
    assert ids[mine["<0x0A>"]] == theirs["Ċ"] and ids[mine["<0x65>"]] == -1  # e has a token of its own
    text = [number for number in range(len(ids)) if ids[number] >= 0]
    assert len(set(ids[text])) == len(text)  # each partner once
    assert vocabularies.overlap.common.sum() == len(text) and not vocabularies.alike


def test_a_tokenizer_with_other_ids_keeps_its_tokens(tokenizers: dict[str, Any]) -> None:
    for kind in ("gpt2", "llama2"):
        student, new = permuted(tokenizers[kind])
        found, vocabularies = retokeniser(tokenizers[kind], student)
        assert vocabularies.alike and np.array_equal(vocabularies.ids, new)
        tokens = np.random.default_rng(1).integers(0, len(new), 50)  # no text that it would make itself
        piece = found.piece(tokens)
        assert np.array_equal(piece.tokens, new[tokens])
        chunks = chunks_of(piece)
        assert np.array_equal(chunks.student, chunks.teacher)
        assert np.array_equal(chunks.student[:, 0], np.arange(1, 50))


def test_what_a_student_cannot_be_given(tokenizers: dict[str, Any]) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "he": 1, "##llo": 2}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="<s>")
    TokenBytes(wordpiece).require_exact("student x")  # all of the text is unknown to it, so nothing is said
    letters = {"[UNK]": 0, **{c: i + 1 for i, c in enumerate("Hesaid:'tTwopc,nlwrm. ")}}
    words = Tokenizer(models.WordPiece(letters | {f"##{c}": 30 + i for c, i in letters.items()}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="the bytes of the tokens of the student x are not known"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")).require_exact("student x")
    gpt2 = tokenizers["gpt2"]
    gpt2_ids = np.array(gpt2("He is <|im_start|>", add_special_tokens=False)["input_ids"])
    with pytest.raises(UnencodableError, match=r"has nothing for the special token '<.im_start.>'"):
        retokeniser(gpt2, wordpiece)[0].piece(gpt2_ids[-1:])
    with pytest.raises(UnencodableError, match="cannot encode 'is '"):
        retokeniser(gpt2, wordpiece)[0].piece(gpt2_ids[:-1])


def test_a_normalising_student_is_aligned_by_its_offsets(tokenizers: dict[str, Any]) -> None:
    teacher, student = tokenizers["gpt2"], tokenizers["qwen"]  # which composes accents
    tokens = np.array(teacher("He is cafe\u0301 Tom, surely", add_special_tokens=False)["input_ids"])
    piece = retokeniser(teacher, student)[0].piece(tokens)
    assert joined(spelled(student, piece.tokens)).decode() == "He is café Tom, surely"
    chunks = chunks_of(piece)
    assert piece.edges[-1] == len("He is cafe\u0301 Tom, surely".encode())
    (last,) = [i for i, part in enumerate(spelled(student, piece.tokens)) if part == b","]
    (theirs,) = [i for i, part in enumerate(spelled(teacher, tokens)) if part == b","]
    assert [last, theirs] in np.stack([chunks.student[:, 0], chunks.teacher[:, 0]], -1).tolist()
