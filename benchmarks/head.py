"""The fused loss compared with cross-entropy over materialised logits: time and peak memory of forward + backward.

    python -m benchmarks.head [--vocab 32000 128256] [--loss forward-kl] [--repeats 7] [--json FILE]

On a CPU float32, 2 threads, N = 2,048 positions, D = 512; on a GPU (`--device cuda`) bfloat16, N = 16,384, D = 2,048.
The baseline is `F.cross_entropy(hidden @ weight.T, labels)`; the fused loss has K = 64 entries per position. Both give
the gradients of the hidden states and of the weight.

Time: the best of several runs, both in turn; the ratio is of those two. Memory: each in a fresh process; `peak` is the
maximum above what was allocated before, `working` the same minus the two gradients, which both must produce (those of
the fused loss exist from the forward pass on; those of the baseline do not exist yet at its peak).
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.record import write
from kdcache import Selection, SparseTargets, select, sparse_kd_loss

K = 64
SIZES = {"cpu": (2048, 512, torch.float32), "cuda": (16384, 2048, torch.bfloat16)}  # N, D, dtype
WAYS = ("cross-entropy", "ours")


def problem(device: str, vocab: int) -> tuple[torch.Tensor, torch.Tensor, SparseTargets, torch.Tensor]:
    """Hidden states and a head that learn; targets of a teacher that is sharp and knows the labels; labels."""
    positions, width, dtype = SIZES[device]
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(positions, width, generator=g, device=device).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width, generator=g, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (positions,), generator=g, device=device)
    parts = [
        select(3 * torch.randn(n, vocab, generator=g, device=device), Selection(k=K)) for n in [64] * (positions // 64)
    ]
    return hidden, weight, SparseTargets.cat(parts), labels


def step(way: str, device: str, vocab: int, loss: str) -> tuple[Callable[[], None], int]:
    """Forward and backward of one way, and the bytes of its gradients."""
    hidden, weight, targets, labels = problem(device, vocab)

    def run() -> None:
        hidden.grad = weight.grad = None
        if way == "ours":
            sparse_kd_loss(hidden, weight, targets, loss=loss).backward()
        else:
            F.cross_entropy(hidden @ weight.T, labels).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run, (hidden.numel() + weight.numel()) * weight.element_size()


def best_times(device: str, vocab: int, loss: str, repeats: int) -> dict[str, float]:
    """Seconds of each way: the best of `repeats`, in turn."""
    runs = {way: step(way, device, vocab, loss)[0] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        for way, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                times[way].append(time.perf_counter() - started)
    return {way: min(found) for way, found in times.items()}


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("memory on a CPU is measured on Linux only")
    return 1024 * int(found[1])


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at most while a function runs."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory of the heap would serve the function and not be counted
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return status("VmHWM") - before


def extra_peak(way: str, device: str, vocab: int, loss: str) -> tuple[int, int]:
    """Bytes of one step above what is there before it: at its peak, and of its gradients. For a fresh process."""
    torch.set_num_threads(2)
    small = torch.randn(64, 64).requires_grad_()  # what libraries allocate at their first use does not count
    sparse_kd_loss(small, small, select(torch.randn(64, 64), Selection(k=4))).backward()
    F.cross_entropy(small @ small.T, torch.arange(64)).backward()
    run, gradients = step(way, device, vocab, loss)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before, gradients
    return peak_above(run), gradients


def in_fresh_process(way: str, device: str, vocab: int, loss: str) -> tuple[int, int]:
    command = [sys.executable, "-m", "benchmarks.head", "--measure", way, "--device", device, "--vocab", str(vocab)]
    done = subprocess.run([*command, "--loss", loss], capture_output=True, text=True, check=True)
    peak, gradients = done.stdout.split()
    return int(peak), int(gradients)


def measure(device: str, vocab: int, loss: str, repeats: int) -> dict[str, dict[str, float]]:
    """Of each way: seconds, and bytes at the peak and of the gradients."""
    times = best_times(device, vocab, loss, repeats)
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        peak, gradients = in_fresh_process(way, device, vocab, loss)
        found[way] = {"seconds": times[way], "peak_bytes": peak, "gradient_bytes": gradients}
    return found


def report(vocab: int, found: dict[str, dict[str, float]]) -> str:
    lines = [f"V = {vocab:,}"]
    working = {}
    for way in WAYS:
        peak = found[way]["peak_bytes"]
        working[way] = peak - found[way]["gradient_bytes"]
        lines.append(
            f"  {way:14} {found[way]['seconds']:7.3f} s   peak {peak / 2**20:7.0f} MiB, "
            f"working {working[way] / 2**20:7.0f} MiB"
        )
    ratio = found["ours"]["seconds"] / found["cross-entropy"]["seconds"]
    peaks = found["ours"]["peak_bytes"] / found["cross-entropy"]["peak_bytes"]
    lines.append(
        f"  ours / rival   {ratio:7.3f}     peak 1/{1 / peaks:<6.1f}      "
        f"working 1/{working['cross-entropy'] / working['ours']:.1f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--loss", default="forward-kl")
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="a file for the results")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(*extra_peak(options.measure, options.device, options.vocab[0], options.loss))
        return
    torch.set_num_threads(2)
    positions, width, dtype = SIZES[options.device]
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, {options.device}, "
        f"{str(dtype).removeprefix('torch.')}, N = {positions:,}, D = {width}, K = {K}, {options.loss}"
    )
    results = {}
    for vocab in options.vocab:
        results[str(vocab)] = measure(options.device, vocab, options.loss, options.repeats)
        print(report(vocab, results[str(vocab)]), flush=True)
    settings = {"positions": positions, "width": width, "dtype": str(dtype), "k": K, "loss": options.loss}
    write(options.json, options.device, settings, results)


if __name__ == "__main__":
    main()
