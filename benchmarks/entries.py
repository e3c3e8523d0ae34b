"""Entries: the squared error of the weights of each selection against the bytes of its entries, on a real teacher.

    python -m benchmarks.entries --teacher DIR --corpus FILE [--rows 16] [--csv FILE] [--plot FILE]

Ids and values are packed and compressed row by row as in an Arrow shard, at the default precision, with an order of
ids from 16 thousand positions before those that are measured. `sample` is also shown at its published 24 bits per entry
(arXiv 2503.16870). The other bytes of a position are not included: tokens and scalars. They are the same for all
selections, except for the mass of the light entries of `ipps`, a scalar of 1.2 bytes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kdcache import Selection, SparseTargets, select
from kdcache.codec import Codec, Layout, deflate, make_codec
from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.pretrained import load_model, load_tokenizer
from kdcache.selection import solve_adaptive_tau

LENGTH = 512
PILOT_ROWS = 32
KEPT = (4, 6, 8, 10, 11, 12, 16, 24, 32, 64)
DRAWN = (10, 25, 50, 100, 200)
MEASURED_SEEDS = 8

COLOURS = {"sample, 24 bits an entry": "#555555", "sample": "#4f772d", "ipps": "#0b6e99", "ipps, adaptive": "#c1440e"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One selection at one size; bytes and entries are means over positions."""

    rule: str
    size: int
    entries: float
    bytes: float
    squared_error: float


def logits_of_rows(teacher: Path, corpus: Path, rows: int) -> Iterator[torch.Tensor]:
    """`[512, V]` of each row of a text."""
    tokens = load_tokenizer(teacher)(corpus.read_text()[: 8 * LENGTH * rows])["input_ids"]
    model = load_model(teacher, "teacher", "float32", torch.device("cpu")).eval()
    with torch.inference_mode():
        for row in torch.tensor(tokens[: LENGTH * rows]).view(rows, 1, LENGTH):
            yield model(input_ids=row, use_cache=False).logits[0]


def rules_of(taus: dict[int, float]) -> dict[tuple[str, int], Selection]:
    found = {("sample", n): Selection(kind="sample", draws=n) for n in DRAWN}
    found |= {("ipps", k): Selection(kind="ipps", k=k) for k in KEPT}
    return found | {("ipps, adaptive", k): Selection(kind="ipps", k=k, tau=tau) for k, tau in taus.items()}


def codec_of(rule: Selection, vocab: int, order: tuple[int, ...]) -> Codec:
    known = dataclasses.replace(rule.known((1.0,)), label_logprob=False)
    return make_codec(Layout.of(rule, vocab, (1.0,), known), "6", order)


def entry_bytes(codec: Codec, targets: SparseTargets) -> int:
    streams = codec.encode(targets)
    return sum(len(deflate(streams[name])) for name in ("ids", "values"))


def measure(teacher: Path, corpus: Path, rows: int) -> list[Point]:
    source = logits_of_rows(teacher, corpus, PILOT_ROWS + rows)
    orders: dict[str, FrequencyOrder] = {}
    sized = {"sample": Selection(kind="sample", draws=50), "ipps": Selection(kind="ipps", k=12)}
    pilot = []
    for number in range(PILOT_ROWS):
        logits = next(source)
        vocab = logits.shape[-1]
        for kind, rule in sized.items():
            orders.setdefault(kind, FrequencyOrder(vocab)).add(select(logits, rule, seed=number))
        pilot.append(logits[::8])  # every eighth position decides tau
    rules = rules_of({k: solve_adaptive_tau(torch.cat(pilot), k) for k in KEPT[1:]})
    codecs = {name: codec_of(rule, vocab, orders[rule.kind].ids()) for name, rule in rules.items()}
    sums = {name: [0.0, 0.0, 0.0] for name in rules}
    for number, logits in enumerate(source):
        p = logits.double().softmax(-1)
        square = p.square().sum()
        for name, rule in rules.items():
            for seed in range(MEASURED_SEEDS):
                found = select(logits, rule, seed=(number * MEASURED_SEEDS + seed))
                weights, kept = found.weights.double(), p.gather(-1, found.ids)
                error = square + (weights.square() - 2 * weights * kept).sum()
                for i, value in enumerate((found.count.sum().item(), 0.0, error.item())):
                    sums[name][i] += value / MEASURED_SEEDS
            sums[name][1] += entry_bytes(codecs[name], found)
    positions = rows * LENGTH
    points = [Point(*name, *(total / positions for total in sums[name])) for name in rules]
    published = [p for p in points if p.rule == "sample"]
    return [dataclasses.replace(p, rule="sample, 24 bits an entry", bytes=3 * p.entries) for p in published] + points


def plot(points: list[Point], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for rule, colour in COLOURS.items():
        line = [p for p in points if p.rule == rule]
        dashed = "--" if rule not in ("ipps", "ipps, adaptive", "sample") else "-"
        axes.plot(
            [p.bytes for p in line], [p.squared_error for p in line], dashed, marker="o", markersize=3.5,
            linewidth=1.8, color=colour, label=rule,
        )  # fmt: skip
        for p in line:
            if p.size in (12, 50):
                axes.annotate(
                    f"{'k' if rule.startswith('ipps') else 'N'} = {p.size}", (p.bytes, p.squared_error), xytext=(7, 3),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                    textcoords="offset points", color=colour, fontsize=9,
                )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="bytes a position for its entries", title=title,
        ylabel="squared error of the weights, mean over positions",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    points = measure(options.teacher, options.corpus, options.rows)
    what = f"{options.teacher.name}, {options.corpus.name}, {options.rows * LENGTH:,} positions"
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, {what}")
    for p in points:
        print(f"{p.rule:26} {p.size:4} {p.entries:6.2f} entries {p.bytes:7.2f} bytes {p.squared_error:.3e}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"# {time.strftime('%Y-%m-%d')}", platform.machine(), f"torch {torch.__version__}", what])
            writer.writerow([field.name for field in dataclasses.fields(Point)])
            writer.writerows([p.rule, p.size, *(f"{x:.6g}" for x in dataclasses.astuple(p)[2:])] for p in points)
    if options.plot:
        plot(points, options.plot, what)


if __name__ == "__main__":
    main()
