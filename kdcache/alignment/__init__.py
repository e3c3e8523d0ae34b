"""Rows of a cache for a student with another tokenizer.

vocabulary.py     which tokens of two tokenizers are the same: by their bytes, special ones by name
retokenise.py     a piece of the teacher's tokens as tokens of the student
chunks.py         the bytes at which both tokenisations have a boundary, and what lies between them
aligned_rows.py   a cache, read as rows of the student with aligned targets
"""

from __future__ import annotations

from kdcache.alignment.aligned_rows import AlignedRows, Alignment, StudentTokenizer, read_student_tokenizer

__all__ = ["AlignedRows", "Alignment", "StudentTokenizer", "read_student_tokenizer"]
