"""Labels, segments and positions of a row."""

from __future__ import annotations

import numpy as np

from kdcache.rows import IGNORE, PackedRow, position_ids

ROW = PackedRow(
    tokens=np.array([5, 6, 7, 8, 9], np.int32),
    piece_lengths=np.array([3, 2], np.int32),
    piece_documents=np.array([11, 12], np.int64),
)


def test_a_label_is_the_next_token_of_the_same_piece() -> None:
    assert ROW.labels(7).tolist() == [6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]


def test_the_mask_is_shifted_with_the_label() -> None:
    row = PackedRow(**{**vars(ROW), "supervised": np.array([True, False, True, False, True])})
    # Slot 0 predicts token 1, which is masked; slot 1 predicts token 2, which is not.
    assert row.labels(6).tolist() == [IGNORE, 7, IGNORE, 9, IGNORE, IGNORE]


def test_segments_and_padding() -> None:
    assert ROW.segments(7).tolist() == [0, 0, 0, 1, 1, -1, -1]
    assert ROW.padded_tokens(7).tolist() == [5, 6, 7, 8, 9, 0, 0]


def test_positions_restart_in_each_piece_and_in_the_padding() -> None:
    segments = np.stack([ROW.segments(7), np.zeros(7, np.int64)])
    assert position_ids(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


def test_locate_names_the_document_and_the_offset() -> None:
    assert [ROW.locate(slot) for slot in range(5)] == [(11, 0), (11, 1), (11, 2), (12, 0), (12, 1)]


def test_a_row_of_one_token_has_no_label() -> None:
    row = PackedRow(
        tokens=np.array([5], np.int32), piece_lengths=np.array([1], np.int32), piece_documents=np.array([0], np.int64)
    )
    assert row.labels(3).tolist() == [IGNORE] * 3
