"""The example that writes a cache of numpy logits, as two processes of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.errors import CacheError
from kdcache.report.inspect import inspect_row, inspect_summary
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from tests.examples.loading import EXAMPLES, example
from tests.processes import ReadyMade, wait_until

pytestmark = pytest.mark.slow

STUDENT = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two processes; one was killed after its first commits and started again."""
    path = tmp_path_factory.mktemp("numpy") / "cache"
    one, two = (ReadyMade("-c", RUN, EXAMPLES / "numpy_teacher.py", path, f"{i}/2", env=ENVIRONMENT) for i in (0, 1))
    wait_until((path / "commits/00002.json").exists, one, "has no second commit", every=0.001)
    one.kill()
    assert one.wait() == -signal.SIGKILL and two.wait() == 0
    left = open_cache(path, partial=True).missing()
    assert left and all(shard % 2 == 0 for shard in left)  # what was begun is not there
    again = [sys.executable, EXAMPLES / "numpy_teacher.py", path, "0/2"]
    assert subprocess.run(again, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    return path


def test_verify_and_inspect_take_it(cache: Path) -> None:
    report, summary = verify_cache(cache), inspect_summary(str(cache))
    assert report.ok and report.shards == 24
    assert summary["complete"] and summary["positions"] == 24 * 16 * 127
    assert not [path for path in cache.rglob("*") if "tmp" in path.name]
    with pytest.raises(CacheError, match="was written without a tokenizer, so its tokens cannot be shown as text"):
        inspect_row(str(cache), 0)


def test_its_targets_are_the_numpy_teachers(cache: Path) -> None:
    """float16 of the square root of p: half a unit of the 11th bit, twice for the square."""
    module, row = example("numpy_teacher"), open_cache(cache)[3]
    tokens = row.tokens.numpy()
    assert (tokens == module.rows_of(0)[3]).all()
    logits = module.logits_of(tokens).astype(np.float64)[:-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    best = np.argsort(-p, -1)[:, :8]
    assert (np.sort(best, -1) == row.targets.ids[:-1].sort(-1).values.numpy()).mean() > 0.999
    stored = torch.zeros(127, 256, dtype=torch.float64).scatter_(
        1, row.targets.ids[:-1].long(), row.targets.weights[:-1].double()
    )
    np.testing.assert_allclose(
        np.take_along_axis(stored.numpy(), best, -1), np.take_along_axis(p, best, -1), rtol=2**-9, atol=1e-6
    )
    assert int(row.targets.count[-1]) == 0


def test_a_student_learns_from_it(cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(STUDENT))
    summary = train(
        TrainConfig(cache=str(cache), student=str(config), out=str(tmp_path / "s"), steps=12, lr=0.02, device="cpu")
    )
    heldout = summary["heldout"]
    assert heldout["after"]["kl"] < heldout["before"]["kl"]
    assert not (tmp_path / "s/tokenizer.json").exists()
