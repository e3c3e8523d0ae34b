"""The vocabularies of two tokenizers: which tokens are the same.

Tokens of text are the same where they stand for the same bytes: first those that are spelled alike, then, where a
vocabulary writes bytes in another way, by the bytes themselves. No two tokens of one side have the same partner.
Special tokens are the same by name: the same text, or else the same role (`bos_token`, `eos_token`, ...).

Two tokenizers are one but for their ids where every token has a partner and a sample of text becomes the same tokens:
rows then keep their tokens, and only ids change.

Cost: a pass over both vocabularies.

Shapes: Vt ids of the teacher, V ids of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.aligned_targets import Overlap
from kdcache.pretrained.tokenizer import SAMPLE, vocabulary_size
from kdcache.token_bytes import TokenBytes

_ROLES = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabularies:
    """Two vocabularies.

    Attributes:
        ids: `[Vt]` the student's id of each token of the teacher, -1 where there is none. The ids of tokens of text are
            all different; several special ones may share one.
        overlap: what they share.
        alike: whether they are one tokenizer but for the ids.
    """

    ids: NDArray[np.int64]
    overlap: Overlap
    alike: bool


def match_vocabularies(teacher: Any, student: Any, of_teacher: TokenBytes, of_student: TokenBytes) -> Vocabularies:
    """Match two vocabularies.

    Args:
        teacher, student: tokenizers of transformers.
        of_teacher, of_student: the bytes of their tokens.
    """
    mine, theirs = teacher.get_vocab(), student.get_vocab()
    ids = np.full(vocabulary_size(teacher), -1, np.int64)
    used = np.zeros(vocabulary_size(student), bool)

    def pair(number: int, partner: int) -> None:
        ids[number], used[partner] = partner, True

    for number, text in of_teacher.special.items():
        partner = _special_partner(teacher, student, text, of_student)
        if partner is not None:
            pair(number, partner)
    plain = {text: n for text, n in mine.items() if n not in of_teacher.special}
    others = {text: n for text, n in theirs.items() if n not in of_student.special}
    if of_teacher.byte_level == of_student.byte_level:
        for text, number in plain.items():
            if text in others:
                pair(number, others[text])
    left = {n: of_student.text(n) for n in sorted(others.values()) if not used[n]}
    by_bytes: dict[bytes, int] = {}
    for named in (False, True):  # a byte that has a token beside its own name is that token
        for number, text_bytes in left.items():
            if text_bytes is not None and of_student.is_byte(number) is named:
                by_bytes.setdefault(text_bytes, number)
    for named in (False, True):
        for number in sorted(plain.values()):
            if ids[number] < 0 and of_teacher.is_byte(number) is named:
                partner = by_bytes.pop(of_teacher.text(number) or b"", None)
                if partner is not None:
                    pair(number, partner)
    overlap = Overlap(used, float((ids >= 0).sum()) / max(1, len(mine)))
    return Vocabularies(ids, overlap, _alike(teacher, student, ids, used))


def _special_partner(teacher: Any, student: Any, text: str, of_student: TokenBytes) -> int | None:
    """The student's token for a special one of the teacher."""
    by_text = {each: number for number, each in of_student.special.items()}
    if text in by_text:
        return by_text[text]
    for role in _ROLES:
        if getattr(teacher, role, None) is not None and str(getattr(teacher, role)) == text:
            named = getattr(student, role, None)
            if named is not None:
                return by_text.get(str(named))
    return None


def _alike(teacher: Any, student: Any, ids: NDArray[np.int64], used: NDArray[np.bool_]) -> bool:
    if len(teacher.get_vocab()) != len(student.get_vocab()) or int((ids >= 0).sum()) != int(used.sum()):
        return False
    if int(used.sum()) != len(student.get_vocab()):
        return False
    one, other = (
        np.array(each(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        for each in (teacher, student)
    )
    return np.array_equal(ids[one], other)
