"""Selection: its time compared with one torch.logsumexp over the same logits, and the error of each kind.

    python -m benchmarks.selection [--teacher DIR --corpus FILE] [--vocab 32000] [--positions 512] [--threads 1]

With a teacher, logits are its own over the start of a text, and its forward pass is timed too; otherwise they are
random. Times are processor seconds, so that other processes on the machine matter little.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdcache import Selection, select
from kdcache.pretrained import load_model, load_tokenizer
from kdcache.selection import solve_adaptive_tau


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def of_teacher(folder: str, corpus: str, positions: int) -> tuple[torch.Tensor, float]:
    """Logits of the first rows of 256 tokens, and the seconds of their forward pass."""
    tokens = load_tokenizer(Path(folder))(Path(corpus).read_text()[: 16 * positions])["input_ids"][:positions]
    rows = torch.tensor(tokens).view(-1, 256)
    model = load_model(Path(folder), "teacher", "float32", torch.device("cpu")).eval()
    with torch.inference_mode():
        logits = model(input_ids=rows, use_cache=False).logits.flatten(0, 1)
        return logits.clone(), seconds(lambda: model(input_ids=rows, use_cache=False).logits)


def squared_error(logits: torch.Tensor, rule: Selection, seeds: int = 6) -> tuple[float, float]:
    """Mean entries, and mean over positions and seeds of sum (w - p)^2."""
    p = logits.double().softmax(-1)
    error = entries = 0.0
    for seed in range(seeds):
        found = select(logits, rule, seed=seed)
        weights, kept = found.weights.double(), p.gather(-1, found.ids)
        error += (p.square().sum(-1) + (weights.square() - 2 * weights * kept).sum(-1)).mean().item() / seeds
        entries += found.count.double().mean().item() / seeds
    return entries, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher")
    parser.add_argument("--corpus")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    forward = None
    if options.teacher:
        logits, forward = of_teacher(options.teacher, options.corpus, options.positions)
    else:
        logits = 3 * torch.randn(options.positions, options.vocab, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(logits.shape[-1], (len(logits),), generator=torch.Generator().manual_seed(0))
    base = seconds(lambda: logits.logsumexp(-1))
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, {options.threads} thread(s), "
        f"logits {list(logits.shape)}, logsumexp {base * 1e3:.1f} ms"
        + (f", forward {forward * 1e3:.1f} ms" if forward else "")
    )
    tau = solve_adaptive_tau(logits, 12)
    rules = {
        "topk 12": Selection(k=12),
        "topk 64": Selection(k=64),
        "topp 0.9 of 64": Selection(kind="topp", k=64, top_p=0.9),
        "sample 50": Selection(kind="sample", draws=50),
        "sample 100": Selection(kind="sample", draws=100),
        "ipps 12": Selection(kind="ipps", k=12),
        f"ipps 12, tau {tau:.4f}": Selection(kind="ipps", k=12, tau=tau),
        "ipps 64": Selection(kind="ipps", k=64),
    }
    for name, rule in rules.items():
        for temperatures in ((1.0,), (1.0, 2.0)):
            took = seconds(lambda: select(logits, rule, labels=labels, temperatures=temperatures))  # noqa: B023
            line = f"{name:24} T = {', '.join(f'{t:g}' for t in temperatures):5} {took / base:5.2f} logsumexp"
            line += f" {took / forward:5.2f} forward" if forward else ""
            if temperatures == (1.0,):
                line += "   {:5.1f} entries, squared error {:.1e}".format(*squared_error(logits, rule))
            print(line)


if __name__ == "__main__":
    main()
