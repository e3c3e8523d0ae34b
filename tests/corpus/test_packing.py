"""Packing keeps documents whole where they fit, and loses nothing that has a next token."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.corpus.packing import Tokens, pack


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
    rows = pack(documents(lengths), seq_len)
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
    rows = pack(documents([5, 6, 4, 3, 8, 2]), 8)
    whole = {int(d) for row in rows for d in row.piece_documents}
    assert whole == set(range(6))
    assert sum(len(row.piece_documents) for row in rows) == 6


def test_best_fit_fills_the_least_room() -> None:
    rows = pack(documents([5, 6, 2]), 8)
    assert [row.piece_documents.tolist() for row in rows] == [[0], [1, 2]]


def test_a_long_document_is_cut_at_row_edges() -> None:
    rows = pack(documents([20]), 8)
    assert [len(row.tokens) for row in rows] == [8, 8, 4]
    assert np.concatenate([row.tokens for row in rows]).tolist() == list(range(20))


def test_the_mask_travels_with_its_tokens() -> None:
    mask = np.array([False, True, True, False, True])
    doc = Tokens(document=0, ids=np.arange(5, dtype=np.int32), supervised=mask)
    (row,) = pack([*documents([2]), doc], 8)
    assert row.supervised is not None
    assert row.supervised.tolist() == [True, True, *mask.tolist()]
    assert pack(documents([5]), 8)[0].supervised is None
