"""The engine vllm against the engine transformers: the same rows, turn by turn, and how far their targets are apart.

    python -m benchmarks.engines --teacher DIR --engine-python .venv-vllm/bin/python --json FILE

Rows hold pieces of 1 to 2,000 tokens of the text that is given. Each round runs the same batch through both engines, so
other work on the machine weighs on both; the ratio is the median over rounds.

    apart    the largest difference of log p (same entries), tails and partitions at T = 1 and 2, in float32
    swapped  positions whose kept ids differ by more than a tie (log p of the swapped entries within 1e-4)
    bf16     KL(float32 of transformers || bfloat16 of each engine): mean and 99th percentile
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import write
from kdcache import Selection, SparseTargets
from kdcache.pretrained import load_tokenizer, vocabulary_size
from kdcache.rows import PackedRow, RowSpec
from kdcache.teacher.engines.base import TargetRequest, TeacherSpec
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher

_TIE = 1e-4


def rows_of(tokens: list[int], seq_len: int, count: int) -> list[PackedRow]:
    """Rows packed with pieces of all lengths; a long piece fills a row."""
    rng, rows, at = np.random.default_rng(0), [], 0
    for number in range(count):
        lengths: list[int] = [seq_len] if number % 4 == 0 else []
        while sum(lengths) < seq_len:
            lengths.append(int(min(seq_len - sum(lengths), 1 + rng.geometric(1 / 200))))
        row = np.array((tokens * (2 + (at + seq_len) // len(tokens)))[at : at + seq_len], np.int32)
        at += seq_len
        rows.append(
            PackedRow(
                tokens=row, piece_lengths=np.array(lengths, np.int32), piece_documents=np.arange(len(lengths))
            )
        )  # fmt: skip
    return rows


def apart(one: SparseTargets, other: SparseTargets) -> dict[str, float]:
    """How far two targets of the same positions are apart."""
    lowest = torch.minimum(one.logprobs[:, -1], other.logprobs[:, -1])
    mine, theirs = one.ids.sort(-1), other.ids.sort(-1)
    same = (mine.values == theirs.values).all(-1)
    near = ((one.logprobs[:, -1] - other.logprobs[:, -1]).abs() < _TIE) & torch.isfinite(lowest)
    values = [each.logprobs.gather(-1, order.indices)[same] for each, order in ((one, mine), (other, theirs))]
    found = {"logprobs": float((values[0] - values[1]).abs().max()), "ties": int((~same & near).sum())}
    found["swapped"] = int((~same & ~near).sum())
    for name in ("log_tail", "log_partition", "entropy", "label_logprob"):
        found[name] = float((getattr(one, name) - getattr(other, name)).abs().max())
    return found


def divergence(teacher: OpenedTeacher, truth: list[Tensor], batches: list[list[PackedRow]]) -> dict[str, float]:
    """KL of the float32 distributions to those of a teacher, nats: mean and 99th percentile."""
    found = []
    for p, rows in zip(truth, batches, strict=True):
        q = torch.cat(list(teacher.logits(rows))).float().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(found)
    return {"mean": float(kl.mean()), "p99": float(kl.quantile(0.99)), "positions": len(kl)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--engine-python", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq-len", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--batch-rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--engine-set", action="append", default=[])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(Path(options.teacher))
    shape = RowSpec(vocab_size=vocabulary_size(tokenizer), seq_len=options.seq_len)
    tokens = tokenizer.encode(Path(options.text).read_text(), add_special_tokens=False, verbose=False)
    rows = rows_of(tokens, options.seq_len, options.rows)
    batches = [rows[i : i + options.batch_rows] for i in range(0, len(rows), options.batch_rows)]
    request = TargetRequest(selection=Selection(k=options.k), temperatures=(1.0, 2.0))
    count = sum(len(row.tokens) for row in rows)
    results: dict[str, Any] = {}
    truth: list[Tensor] = []
    for dtype in options.dtypes.split(","):
        plain = TeacherSpec(model=options.teacher, dtype=dtype, device="cpu", batch_rows=options.batch_rows)
        started = time.perf_counter()
        with (
            open_teacher(plain, shape) as transformers,
            open_teacher(
                TeacherSpec(
                    model=options.teacher, dtype=dtype, engine="vllm", batch_rows=options.batch_rows,
                    engine_python=options.engine_python, engine_set=tuple(options.engine_set),
                ),
                shape,
            ) as vllm,
        ):  # fmt: skip
            opened, seconds = time.perf_counter() - started, []
            for round_ in range(options.rounds + 1):
                took, found = [], []
                for teacher in (transformers, vllm):
                    started = time.perf_counter()
                    found.append(SparseTargets.cat([t.targets for t in teacher.targets_of(batches, request)]))
                    took.append(time.perf_counter() - started)
                if round_:  # the first one warms up
                    seconds.append(took)
                print(dtype, [f"{count / each:,.0f} tokens/s" for each in took], flush=True)
            one, two = np.array(seconds).T
            results[dtype] = {
                "transformers_tokens_per_second": float(count / np.median(one)),
                "vllm_tokens_per_second": float(count / np.median(two)),
                "ratio": float(np.median(one / two)), "opened_seconds": opened, "apart": apart(*found),
                "vllm": vllm.compute,
            }  # fmt: skip
            if dtype == "float32":
                truth = [torch.cat(list(transformers.logits(part))).float().log_softmax(-1) for part in batches]
            elif truth:
                results[dtype]["kl_transformers"] = divergence(transformers, truth, batches)
                results[dtype]["kl_vllm"] = divergence(vllm, truth, batches)
        print(dtype, results[dtype], flush=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "engine_python")}
    settings |= {name: Path(settings[name]).name for name in ("teacher", "text")}
    write(options.json, "cpu", {**settings, "tokens": count}, results)


if __name__ == "__main__":
    main()
