"""Ranks share the rows that are measured; their figures are those of one rank to a rounding of float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.measuring import figures
from tests.processes import Ranks

ROWS = 9


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: v for k, one in value.items() for key, v in flat(one, f"{name}/{k}").items()}
    return {name: value}


@pytest.mark.slow
def test_ranks_share_the_rows(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Five batches of the first cache and two of the second, over three ranks: the last has none of the second."""
    process = Ranks(3, "-m", "tests.distributed.measuring", str(cache), str(student_config), str(ROWS), str(tmp_path))
    _, words = process.communicate()
    assert process.returncode == 0, words
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have, so that products are rounded alike
    try:
        alone = flat(figures(str(cache), str(student_config), ROWS))
    finally:
        torch.set_num_threads(threads)
    assert alone["/caches/first/positions"] > alone["/caches/second/positions"] > 0
    for rank in range(3):
        found = flat(json.loads((tmp_path / f"{rank}.json").read_text()))
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            expected = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-13)
            assert found[name] == expected, name
