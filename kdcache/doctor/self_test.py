"""Self-test: a random teacher of two layers is dumped, its cache verified, and a student trained from it.

What is tested is that the parts work together on this machine and this device: tokenizer, packing, isolation, forward
passes, selection, codec, store, loss, optimiser. Cost: some ten seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from kdcache.demo.model import llama_config, train_teacher, train_tokenizer, write_config
from kdcache.errors import KdcacheError, one_line
from kdcache.report.faithfulness import check_faithfulness
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump
from kdcache.verify import verify_cache

SEQ_LEN = 64
_STEPS = 4


def run_self_test(device: str, on_stage: Callable[[str], None]) -> dict[str, Any]:
    """Dump, verify, run the teacher again, and train.

    Args:
        device: where the models run.
        on_stage: called with the name of each stage as it begins.

    Returns:
        `ok`, `device`, `seconds` by stage, and `error`, a sentence, where something failed.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="kdcache-doctor-") as name:
        folder = Path(name)
        stages: dict[str, Callable[[], None]] = {
            "teacher": lambda: _make_teacher(folder), "dump": lambda: _dump(folder, device),
            "verify": lambda: _verify(folder, device), "train": lambda: _train(folder, device),
        }  # fmt: skip
        for stage, work in stages.items():
            on_stage(stage)
            started = time.perf_counter()
            try:
                work()
            except KdcacheError as error:
                return _result(device, seconds, f"{stage}: {error}")
            except Exception as error:  # a library that does not work here is what is looked for
                return _result(device, seconds, f"{stage}: {type(error).__name__}: {one_line(error)}")
            seconds[stage] = time.perf_counter() - started
    return _result(device, seconds, None)


def _result(device: str, seconds: dict[str, float], error: str | None) -> dict[str, Any]:
    return {"ok": error is None, "device": device, "seconds": seconds, "error": error}


def _texts() -> list[str]:
    """Some texts that every machine has: sentences over a few words."""
    words = ["the", "river", "turns", "under", "a", "bridge", "and", "nobody", "sees", "it", "at", "night"]
    return [" ".join(words[(i * k + 1) % len(words)] for k in range(5, 25)).capitalize() + "." for i in range(1, 60)]


def _make_teacher(folder: Path) -> None:
    from kdcache.corpus.packing import pack
    from kdcache.corpus.tokenise import Tokeniser

    texts = _texts()
    tokenizer = train_tokenizer(texts, folder / "teacher")
    rows = pack(Tokeniser(tokenizer, len(tokenizer)).texts(list(enumerate(texts))), SEQ_LEN).rows
    train_teacher(
        rows, llama_config(64, 2, SEQ_LEN), folder / "teacher", seconds=60.0, most_steps=3, seed=0, seq_len=SEQ_LEN,
        on_progress=lambda *_: None,
    )  # fmt: skip
    write_config(llama_config(32, 1, SEQ_LEN), folder / "student.json")
    (folder / "texts.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))


def _dump(folder: Path, device: str) -> None:
    dump(
        DumpConfig(
            teacher=str(folder / "teacher"), corpus=str(folder / "texts.jsonl"), out=str(folder / "cache"),
            seq_len=SEQ_LEN, k=8, temperatures="1,2", device=device, docs_per_shard=30,
        )
    )  # fmt: skip


def _verify(folder: Path, device: str) -> None:
    report = verify_cache(folder / "cache")
    if not report.ok:
        raise RuntimeError(f"the cache is damaged: {report.problems[0]['what']}")
    found = check_faithfulness(folder / "cache", str(folder / "teacher"), rows=2, device=device)
    if not found["agrees"]:
        raise RuntimeError("the teacher says something else when it is run again")


def _train(folder: Path, device: str) -> None:
    summary = train(
        TrainConfig(
            cache=(str(folder / "cache"),), student=str(folder / "student.json"), out=str(folder / "student"),
            steps=_STEPS, heldout=0.1, device=device,
        )
    )  # fmt: skip
    if not summary["heldout"]["after"]["nll"] > 0:
        raise RuntimeError("the student's loss is no number")
