"""The code in the pages about writing a cache and about engines runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import base
from tests.examples.loading import EXAMPLES
from tests.making import dump_options


def code_of(page: str) -> str:
    text = (EXAMPLES.parent / "docs" / page).read_text()
    return "".join(block.partition("```")[0] for block in text.split("```python")[1:])


def my_rows(shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(shard)
    for n in (128, 3):
        yield torch.randint(0, 256, (n,), generator=g), torch.randn(n, 256, generator=g)


def test_writing_a_cache(tmp_path: Path) -> None:
    names: dict[str, Any] = {"my_rows": my_rows, "print": lambda summary: None, "teacher_tokens": torch.arange(8)}
    code = code_of("writing-caches.md").replace("my-cache", str(tmp_path / "c"))
    exec(code.replace("told-cache", str(tmp_path / "told")), names)
    assert open_cache(tmp_path / "told", partial=True).manifest.teacher_context
    assert verify_cache(tmp_path / "c").ok and len(open_cache(tmp_path / "c")) == 8
    tokens, logits = next(my_rows(2))
    row = open_cache(tmp_path / "c")[4]
    assert torch.equal(row.tokens, tokens)
    assert torch.equal(row.targets.ids[:127].sort(-1).values, logits.topk(8).indices[:127].sort(-1).values)


def test_an_engine(teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._ENGINES, "_values", dict(base._ENGINES._values))
    names: dict[str, Any] = {}
    exec(code_of("engines.md"), names)
    assert dump(dump_options(teacher, corpus, tmp_path / "c", engine="bigram", limit_docs=10))["complete"]
    assert not names["top_k_only"].entropy
