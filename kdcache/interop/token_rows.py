"""Token rows: the token ids of the sequences of a cache that keeps none.

A file of records with `input_ids`, and optionally `piece_lengths`, one for each sequence, in the order of the cache.
Cost: the ids of all rows in memory, 8 bytes a token, while such a cache is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.interop.records import Records, integers

COLUMNS = ("input_ids", "piece_lengths")


@dataclass(frozen=True)
class TokenRow:
    """One sequence.

    Attributes:
        tokens: `[n]`.
        piece_lengths: `[P]`; None where the file does not say.
    """

    tokens: NDArray[np.int64]
    piece_lengths: NDArray[np.int64] | None


def read_token_rows(path: str) -> list[TokenRow]:
    """All rows of a file.

    Raises:
        CorpusError: it cannot be read, or has records without `input_ids`.
    """
    records, found = Records(path, COLUMNS), []
    for part in records.parts():
        for where, record in records.read(part):
            lengths = record.get("piece_lengths")
            found.append(
                TokenRow(
                    integers(record.get("input_ids"), where, "input_ids"),
                    None if lengths is None else integers(lengths, where, "piece_lengths"),
                )
            )
    return found
