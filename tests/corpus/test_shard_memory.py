"""The memory of a shard's rows is that of its tokens: 2 bytes each, and what some megabytes of text take on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.making import TEXTS

CHILD = """
import sys
from transformers import AutoTokenizer
from kdcache.corpus.shards import Shaping, shard_rows
from kdcache.corpus.sources import open_corpus
from kdcache.corpus.survey import survey
from kdcache.corpus.tokenise import Tokeniser
from kdcache.planning.memory import peak_resident

shaping = Shaping(tokeniser=Tokeniser(AutoTokenizer.from_pretrained(sys.argv[1]), 320), seq_len=256)
found = []
for path in sys.argv[2:]:
    corpus = open_corpus(path)
    made = shard_rows(corpus, survey(corpus, {"chars_per_shard": 1 << 40}).plan, 0, shaping)
    tokens = sum(len(row.tokens) for batch in made.rows.batches(8) for row in batch)
    found.append((tokens, peak_resident()))
print(*[number for pair in found for number in pair])
"""


@pytest.mark.slow
def test_eight_times_the_characters_take_little_more_memory(teacher: Path, tmp_path: Path) -> None:
    text = "\n\n".join(TEXTS)
    for name, times in (("small", 50), ("large", 400)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([text] * times))
    paths = [str(tmp_path / f"{name}.txt") for name in ("small", "large")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(teacher), *paths], capture_output=True, text=True, check=True
    )
    few, before, many, after = map(int, done.stdout.split())
    assert many > 7.5 * few > 1_000_000
    assert after - before < 6 * (many - few) + (24 << 20)  # 28 bytes a piece are in it; objects took 190 a character
