"""Encode and decode: positions a second, bytes a position and added KL, beside a torch.save file under zstd-3.

    python -m benchmarks.codec [--cache CACHE] [--k 12 64 128] [--bits 6] [--rows 40]

One thread. The rival is what people write first: a dictionary of float16 log-probabilities, the low 16 bits of
the ids and their 17th bits packed, saved by torch and compressed by zstd at level 3, one file a row. Targets come
from a float32 cache, or from synthetic logits with a long tail and popular ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd

from kdcache import Selection, SparseTargets, open_cache, select
from kdcache.codec.compact import CompactCodec

TEMPERATURES = (1.0, 2.0)


def synthetic(rows: int, positions: int = 512, vocab: int = 32_000) -> tuple[list[SparseTargets], int]:
    generator = torch.Generator().manual_seed(0)
    popularity = -1.1 * torch.arange(1, vocab + 1).float().log()[torch.randperm(vocab, generator=generator)]
    found = []
    for _ in range(rows):
        sharpness = 1 + 2 * torch.rand(positions, 1, generator=generator)
        logits = sharpness * (popularity + 1.5 * torch.randn(positions, vocab, generator=generator))
        labels = torch.randint(vocab, (positions,), generator=generator)
        found.append(select(logits, Selection(k=128), labels=labels, temperatures=TEMPERATURES))
    return found, vocab


def from_cache(path: str, rows: int) -> tuple[list[SparseTargets], int]:
    cache = open_cache(path)
    return [cache.read_packed(i)[1] for i in range(min(rows, len(cache)))], cache.manifest.vocab_size


def narrowed(targets: SparseTargets, k: int) -> SparseTargets:
    """The k largest of targets that hold more, the rest moved into every tail."""
    tails = []
    for t in targets.temperatures:
        logprobs, tail = targets.at_temperature(t)
        tails.append(torch.cat([logprobs[:, k:], tail[:, None]], -1).double().logsumexp(-1).float())
    cut = {name: getattr(targets, name)[:, :k].contiguous() for name in ("ids", "logprobs", "weights")}
    return dataclasses.replace(targets, **cut, count=torch.full_like(targets.count, k), log_tail=torch.stack(tails, -1))


def rival_encode(targets: SparseTargets, zstd: Zstd) -> bytes:
    ids = targets.ids.numpy()
    file = io.BytesIO()
    torch.save(
        {
            "logprobs": targets.logprobs.half(),
            "low": torch.from_numpy(ids.astype(np.uint16)),
            "high": torch.from_numpy(np.packbits(ids >> 16 & 1)),
        },
        file,
    )
    return bytes(zstd.encode(file.getvalue()))


def rival_decode(data: bytes, zstd: Zstd) -> tuple[torch.Tensor, torch.Tensor]:
    saved = torch.load(io.BytesIO(zstd.decode(data)), weights_only=True)
    low = saved["low"].to(torch.int32)
    high = torch.from_numpy(np.unpackbits(saved["high"].numpy(), count=low.numel())).view(low.shape)
    return low | high.to(torch.int32) << 16, saved["logprobs"].float()


def added_kl(whole: SparseTargets, again: SparseTargets, t: float) -> torch.Tensor:
    (p, tail), (q, stored) = whole.at_temperature(t), again.at_temperature(t)
    p = p.gather(-1, whole.ids.argsort(-1)).double()
    q = q.gather(-1, again.ids.argsort(-1)).double()
    last = torch.where(torch.isinf(tail), 0.0, tail.double().exp() * (tail.double() - stored.double()))
    return (p.exp() * (p - q)).sum(-1) + last


def best_of(repeats: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a float32 cache of at least the largest --k; synthetic targets otherwise")
    parser.add_argument("--k", type=int, nargs="+", default=[12, 64, 128])
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, vocab = from_cache(options.cache, options.rows) if options.cache else synthetic(options.rows)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, one thread, {options.bits} bits"
    )
    print("rates in million positions a second; ratios are ours over the rival's")
    for k in options.k:
        print(measure([narrowed(row, k) for row in rows], vocab, k, options.bits))


def measure(whole: list[SparseTargets], vocab: int, k: int, bits: int) -> str:
    zstd = Zstd(3)
    counts = np.bincount(torch.cat([row.ids for row in whole[:20]]).flatten().numpy(), minlength=vocab)
    order = tuple(np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist())
    codec = CompactCodec(kind="topk", width=k, vocab_size=vocab, temperatures=TEMPERATURES, bits=bits, id_order=order)
    positions = sum(len(row.count) for row in whole)
    ours, theirs = [codec.encode(row) for row in whole], [rival_encode(row, zstd) for row in whole]
    pairs = list(zip(ours, whole, strict=True))

    def run(work: Callable[[Any], object], items: Sequence[Any]) -> float:
        def once() -> None:
            for item in items:
                work(item)

        return positions / best_of(5, once) / 1e6

    rates = {
        "encode": (run(codec.encode, whole), run(lambda row: rival_encode(row, zstd), whole)),
        "decode": (
            run(lambda pair: codec.decode(pair[0], len(pair[1].count)), pairs),
            run(lambda data: rival_decode(data, zstd), theirs),
        ),
    }
    size = sum(len(stream) for streams in ours for stream in streams.values()) / positions
    line = f"k={k:<4} bytes {size:6.1f} (rival {sum(map(len, theirs)) / positions:6.1f})"
    for name, (mine, other) in rates.items():
        line += f"  {name} {mine:5.2f} (rival {other:5.2f}, ratio {mine / other:4.2f})"
    decoded = [codec.decode(streams, len(row.count)) for streams, row in pairs]
    for t in TEMPERATURES:
        kl = torch.cat([added_kl(row, again, t) for row, again in zip(whole, decoded, strict=True)])
        line += f"  KL at T={t:g} {kl.mean():.1e}, worst {kl.max():.1e}"
    return line


if __name__ == "__main__":
    main()
