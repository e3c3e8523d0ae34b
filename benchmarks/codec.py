"""Codec: positions per second, bytes per position and added KL, compared with a torch.save file under zstd-3.

    python -m benchmarks.codec [--cache CACHE] [--k 12 64 128] [--ipps 12] [--bits 6] [--rows 40]

One thread. Each time is the least of several, the codec and the baseline in turn, and includes what a store does: the
codec and the compression of each stream by itself. The baseline is the obvious way: a dictionary of float16
log-probabilities, the low 16 bits of the ids and their 17th bits packed, saved by torch and compressed by zstd at level
3, one file a row. Targets come from a float32 cache, or from synthetic logits with a long tail and frequent ids; `ipps`
always uses the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.codec import Codec, Layout, deflate, inflate, make_codec

TEMPERATURES = (1.0, 2.0)
ZSTD_3 = pa.Codec("zstd", compression_level=3)


def synthetic(
    rows: int, selection: Selection, temperatures: tuple[float, ...] = TEMPERATURES, positions: int = 512
) -> tuple[list[SparseTargets], int]:
    vocab = 32_000
    generator = torch.Generator().manual_seed(0)
    popularity = -1.1 * torch.arange(1, vocab + 1).float().log()[torch.randperm(vocab, generator=generator)]
    found = []
    for _ in range(rows):
        sharpness = 1 + 2 * torch.rand(positions, 1, generator=generator)
        logits = sharpness * (popularity + 1.5 * torch.randn(positions, vocab, generator=generator))
        labels = torch.randint(vocab, (positions,), generator=generator)
        found.append(select(logits, selection, labels=labels, temperatures=temperatures))
    return found, vocab


def from_cache(path: str, rows: int) -> tuple[list[SparseTargets], int]:
    from kdcache import open_cache

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


def rival_encode(targets: SparseTargets) -> tuple[int, bytes]:
    ids = targets.ids.numpy()
    file = io.BytesIO()
    values = targets.weights if targets.sampled else targets.logprobs
    torch.save(
        {
            "values": values.half(),
            "low": torch.from_numpy(ids.astype(np.uint16)),
            "high": torch.from_numpy(np.packbits(ids >> 16 & 1)),
        },
        file,
    )
    return len(file.getvalue()), ZSTD_3.compress(file.getvalue(), asbytes=True)


def rival_decode(sized: tuple[int, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    size, data = sized
    saved = torch.load(io.BytesIO(ZSTD_3.decompress(data, size, asbytes=True)), weights_only=True)
    low = saved["low"].to(torch.int32)
    high = torch.from_numpy(np.unpackbits(saved["high"].numpy(), count=low.numel())).view(low.shape)
    return low | high.to(torch.int32) << 16, saved["values"].float()


def encode(codec: Codec, targets: SparseTargets) -> tuple[int, dict[str, bytes]]:
    return len(targets.count), {name: deflate(stream) for name, stream in codec.encode(targets).items()}


def decode(codec: Codec, sized: tuple[int, dict[str, bytes]]) -> SparseTargets:
    positions, frames = sized
    shapes = codec.streams(positions).items()
    streams = {name: inflate(frames[name], math.prod(shape) * dtype.itemsize, dtype) for name, (dtype, shape) in shapes}
    return codec.decode(streams, positions)


def added_kl(whole: SparseTargets, again: SparseTargets, t: float) -> torch.Tensor:
    """`[n]` KL of the stored targets from the exact ones at a temperature, entries and tail."""
    if whole.sampled:
        p, q = whole.weights.log(), again.weights.log()
        tail = stored = torch.full_like(whole.entropy, -torch.inf)
    else:
        (p, tail), (q, stored) = whole.at_temperature(t), again.at_temperature(t)
    p = p.gather(-1, whole.ids.argsort(-1)).double()
    q = q.gather(-1, again.ids.argsort(-1)).double()
    last = torch.where(torch.isinf(tail), 0.0, tail.double().exp() * (tail.double() - stored.double()))
    return (p.exp() * (p - q)).sum(-1) + last


def rates(works: Sequence[tuple[Callable[[Any], object], Sequence[Any]]], positions: int, repeats: int) -> list[float]:
    """Million positions per second of each function over its items; the functions run in turn."""
    best = [math.inf] * len(works)
    for _ in range(repeats):
        for storage, (work, items) in enumerate(works):
            started = time.thread_time()
            for item in items:
                work(item)
            best[storage] = min(best[storage], time.thread_time() - started)
    return [positions / seconds / 1e6 for seconds in best]


def measure(rows: list[SparseTargets], vocab: int, bits: int, repeats: int = 7) -> str:
    kind, k, temperatures = rows[0].kind, rows[0].ids.shape[-1], rows[0].temperatures
    pilot, rows = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    counts = np.bincount(torch.cat([row.ids for row in pilot]).flatten().numpy(), minlength=vocab)
    order = tuple(np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist())
    codec = make_codec(Layout.of(Selection(kind=kind, k=k), vocab, temperatures), str(bits), order)
    positions = sum(len(row.count) for row in rows)
    ours, theirs = [encode(codec, row) for row in rows], [rival_encode(row) for row in rows]
    size = {name: sum(len(frames[name]) for _, frames in ours) / positions for name in ours[0][1]}
    line = f"{kind} k={k:<4} bytes {sum(size.values()):6.1f} ({', '.join(f'{n} {b:.1f}' for n, b in size.items())})"
    line += f"; rival {sum(len(data) for _, data in theirs) / positions:.1f}"
    works: list[tuple[Callable[[Any], object], Sequence[Any]]] = [
        (lambda row: encode(codec, row), rows), (rival_encode, rows),
        (lambda sized: decode(codec, sized), ours), (rival_decode, theirs),
    ]  # fmt: skip
    found = rates(works, positions, repeats)
    for name, mine, other in zip(("encode", "decode"), found[::2], found[1::2], strict=True):
        line += f"; {name} {mine:.2f}, rival {other:.2f}, ratio {mine / other:.2f}"
    decoded = [decode(codec, sized) for sized in ours]
    for t in temperatures:
        kl = torch.cat([added_kl(row, again, t) for row, again in zip(rows, decoded, strict=True)])
        line += f"; KL at T={t:g} {kl.mean():.1e}, worst {kl.max():.1e}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a float32 cache of at least the largest --k; synthetic targets otherwise")
    parser.add_argument("--k", type=int, nargs="*", default=[12, 64, 128])
    parser.add_argument("--ipps", type=int, nargs="*", default=[12])
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--rows", type=int, default=40, help="half of them for the id order, as a pilot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, one thread, {options.bits} bits"
    )
    print("rates in million positions a second; ratios are ours over the rival's")
    if options.k:
        rows, vocab = (
            from_cache(options.cache, options.rows) if options.cache else synthetic(options.rows, Selection(k=128))
        )
        for k in options.k:
            print(measure([narrowed(row, k) for row in rows], vocab, options.bits))
    for k in options.ipps:
        rows, vocab = synthetic(options.rows, Selection(kind="ipps", k=k), (1.0,))
        print(measure(rows, vocab, options.bits))


if __name__ == "__main__":
    main()
