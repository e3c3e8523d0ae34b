"""One rank of a measurement, for test_measuring.py: the figures of a random student over rows of a cache, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kdcache import open_cache
from kdcache.student import distributed
from kdcache.student.evaluation import measure_each
from kdcache.student.model import load_student
from tests.distributed.leaving import leave


def figures(cache: str, student: str, rows: int) -> dict[str, Any]:
    opened, cpu = open_cache(cache), torch.device("cpu")
    model = load_student(student, opened, cpu, seed=0)
    readers = {"first": opened, "second": opened}
    return measure_each(model, readers, [range(rows), range(rows, rows + 3)], cpu, batch_rows=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    found = figures(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    Path(sys.argv[4], f"{distributed.rank()}.json").write_text(json.dumps(found))
    leave()
