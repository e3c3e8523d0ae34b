"""Packing keeps documents whole where they fit, loses nothing that has a next token, and counts what it may lose."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kdcache.corpus.packing import Packed, Tokens, pack


def documents(lengths: list[int]) -> list[Tokens]:
    ends = np.cumsum(lengths)
    return [
        Tokens(document=i, ids=np.arange(end - n, end, dtype=np.int32))
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_every_token_once_and_pieces_whole(seed: int, seq_len: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 40, 200).tolist()
    rows = pack(documents(lengths), seq_len).rows
    pieces: dict[int, list[int]] = {}
    for row in rows:
        assert 0 < len(row.tokens) <= seq_len
        assert row.piece_lengths.sum() == len(row.tokens)
        assert row.piece_lengths.min() > 1
        at = 0
        for n, document in zip(row.piece_lengths, row.piece_documents, strict=True):
            pieces.setdefault(int(document), []).extend(row.tokens[at : at + n].tolist())
            at += n
    for doc in documents(lengths):
        whole = doc.ids.tolist()
        if len(whole) % seq_len == 1:  # the last token alone has no next one
            whole = whole[:-1]
        # The remainder of a long document may lie in an earlier row than its full pieces.
        assert sorted(pieces.get(doc.document, [])) == whole


def test_a_document_that_fits_is_never_cut() -> None:
    rows = pack(documents([5, 6, 4, 3, 8, 2]), 8).rows
    whole = {int(d) for row in rows for d in row.piece_documents}
    assert whole == set(range(6))
    assert sum(len(row.piece_documents) for row in rows) == 6


def test_ids_that_need_four_bytes_come_late() -> None:
    ids = [[1, 65_535, 2], [3, 65_536], [2**31 - 1, 4, 5]]
    packed = pack([Tokens(document=i, ids=np.array(one, np.int32)) for i, one in enumerate(ids)], 3)
    assert [row.tokens.tolist() for row in packed.rows] == ids
    assert all(row.tokens.dtype == np.int32 for row in packed.rows)


def test_best_fit_fills_the_least_room() -> None:
    rows = pack(documents([5, 6, 2]), 8).rows
    assert [row.piece_documents.tolist() for row in rows] == [[0], [1, 2]]


def test_a_long_document_is_cut_at_row_edges() -> None:
    rows = pack(documents([20]), 8).rows
    assert [len(row.tokens) for row in rows] == [8, 8, 4]
    assert np.concatenate([row.tokens for row in rows]).tolist() == list(range(20))


def test_the_mask_travels_with_its_tokens() -> None:
    mask = np.array([False, True, True, False, True])
    doc = Tokens(document=0, ids=np.arange(5, dtype=np.int32), supervised=mask)
    (row,) = pack([*documents([2]), doc], 8).rows
    assert row.supervised is not None
    assert row.supervised.tolist() == [True, True, *mask.tolist()]
    assert pack(documents([5]), 8).rows[0].supervised is None


def sizes(packed: Packed) -> list[tuple[int, int]]:
    """Document and tokens of each piece, in order of the documents."""
    return sorted(
        (int(document), int(n))
        for row in packed.rows
        for document, n in zip(row.piece_documents, row.piece_lengths, strict=True)
    )


@pytest.mark.parametrize("rule", ["best-fit", "none"])
@pytest.mark.parametrize(
    ("overlong", "whole", "left", "cut", "truncated", "dropped"),
    [
        ("cut", True, [(0, 8), (1, 8), (1, 8), (2, 4), (2, 8)], 2, 0, {"too-short": 2}),
        ("truncate", False, [(0, 8), (1, 8), (2, 8)], 0, 2, {"too-short": 2}),
        ("drop", False, [(0, 8)], 0, 0, {"overlong": 2, "too-short": 2}),
        ("auto", False, [(0, 8), (1, 8), (1, 8), (2, 4), (2, 8)], 2, 0, {"too-short": 2}),
        ("auto", True, [(0, 8), (1, 8), (2, 8)], 0, 2, {"too-short": 2}),
    ],
)
def test_what_is_too_long(
    rule: str, overlong: str, whole: bool, left: list[tuple[int, int]], cut: int, truncated: int,
    dropped: dict[str, int],
) -> None:  # fmt: skip
    given = [dataclasses.replace(doc, whole=whole) for doc in documents([8, 17, 12, 1, 0])]
    packed = pack(given, 8, pack=rule, overlong=overlong)
    assert sizes(packed) == left
    assert (packed.cut, packed.truncated, packed.dropped) == (cut, truncated, dropped)
    for row in packed.rows:  # what is left of a document begins where it begins
        if overlong != "cut" and (whole or overlong != "auto"):
            starts = np.cumsum(row.piece_lengths) - row.piece_lengths
            assert row.tokens[starts].tolist() == [given[n].ids[0] for n in row.piece_documents]


@pytest.mark.parametrize(("last", "left"), [(7, 1), (8, 0), (0, 0)])
def test_a_truncated_document_keeps_a_label_or_is_left_out(last: int, left: int) -> None:
    mask = np.zeros(20, bool)
    mask[[last, 19]] = True  # the first token of a row is no label
    doc = Tokens(document=3, ids=np.arange(20, dtype=np.int32), supervised=mask, whole=True)
    packed = pack([doc], 8)
    assert len(packed.rows) == packed.truncated == left
    assert packed.dropped == ({} if left else {"overlong": 1})


def test_a_document_of_several_sequences_counts_once() -> None:
    def doc(number: int, length: int, label: int = 1) -> Tokens:
        ids = np.arange(length, dtype=np.int32)
        return Tokens(document=number, ids=ids, supervised=ids == label, whole=True)

    given = [
        doc(0, 20), doc(0, 20), doc(0, 5), doc(1, 20, 15), doc(1, 3), doc(2, 20, 15), doc(2, 20, 15),
        doc(3, 1), doc(3, 6), doc(4, 1), doc(4, 0), doc(5, 1), doc(5, 20, 15),
    ]  # fmt: skip
    packed = pack(given, 8)
    assert sizes(packed) == [(0, 5), (0, 8), (0, 8), (1, 3), (3, 6)]
    assert (packed.cut, packed.truncated) == (0, 2)  # of document 1 a sequence is gone
    assert packed.dropped == {"overlong": 2, "too-short": 1}
    assert (packed := pack(given, 8, overlong="cut")).cut == 4 and packed.dropped == {"too-short": 1}


def test_a_row_for_each_document_the_longest_first() -> None:
    rows = pack(documents([3, 9, 5, 3, 20, 5, 1]), 8, pack="none").rows
    assert [len(row.piece_lengths) for row in rows] == [1] * 8
    assert [(int(row.piece_documents[0]), len(row.tokens)) for row in rows] == [
        (1, 8), (4, 8), (4, 8), (2, 5), (5, 5), (4, 4), (0, 3), (3, 3),
    ]  # fmt: skip
    assert rows[1].tokens.tolist() == list(range(20, 28))


def test_the_mask_travels_with_its_tokens_also_without_packing() -> None:
    mask = np.array([False, True, True, False, True])
    doc = Tokens(document=1, ids=np.arange(5, dtype=np.int32), supervised=mask)
    rows = pack([*documents([2]), doc], 8, pack="none").rows
    assert rows[0].supervised is not None and rows[0].supervised.tolist() == mask.tolist()
    assert rows[1].supervised is None


def test_nothing_left() -> None:
    for rule in ("best-fit", "none"):
        packed = pack(documents([1, 0]), 8, pack=rule)
        assert len(packed.rows) == 0 and packed.dropped == {"too-short": 2}
        assert len(pack([], 8, pack=rule).rows) == 0
