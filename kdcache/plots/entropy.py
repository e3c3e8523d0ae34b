"""Entropy: how sure the teacher was, by how much it had read and by document.

The number of tokens read is counted inside the context, as the teacher's position ids count it, the token of the slot
included; what a teacher alone reads before a piece is not in it. Quantiles over the positions of a bin are read off a
histogram of the store's bins (`kdcache.store.commit`). A document counts by those of its positions that lie in the
rows that were read.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from kdcache.cache import Cache
from kdcache.drawing import COLOURS, LEVEL, finish
from kdcache.errors import ConfigError
from kdcache.lazy_torch import torch
from kdcache.plots.plot import Plot, Progress
from kdcache.plots.read_rows import read_packed_spread
from kdcache.rows import IGNORE
from kdcache.store.commit import MOST_BINS, histogram, quantiles

_EXTREMES = 5
_MOST_DOCUMENTS = 20_000
"""Documents in the numbers and the picture; of more, as many are taken evenly."""


def entropy(cache: Cache, rows: int, on_progress: Progress | None = None) -> Plot:
    """Mean entropy by tokens read, and by document, nats.

    Raises:
        ConfigError: the cache does not know the entropy, or has no position with a target in these rows.
    """
    cache.known.require("entropy", "a plot of it")
    spec, longest = cache.manifest.row_spec, cache.manifest.seq_len
    edges = _edges(longest)
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
    histograms = np.zeros((len(edges) - 1, MOST_BINS), np.int64)
    of_documents: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
    for _, row, targets in read_packed_spread(cache, rows, on_progress):
        slots = np.flatnonzero(row.labels(longest) != IGNORE)[(targets.count > 0).numpy()]
        values = targets.require("entropy", "a plot of it")[targets.count > 0].double()
        segments = row.segments(longest)
        read = spec.position_ids(segments)[slots] + 1
        bins = np.searchsorted(edges, read, side="right") - 1
        np.add.at(sums, bins, values.numpy())
        np.add.at(counts, bins, 1)
        for number in np.unique(bins):
            found = histogram(values[torch.from_numpy(bins == number)])
            histograms[number, : len(found)] += np.array(found)
        documents = row.piece_documents[segments[slots]]
        for document in np.unique(documents).tolist():
            mine = values.numpy()[documents == document]
            of_documents[document][0] += float(mine.sum())
            of_documents[document][1] += len(mine)
    if not counts.sum():
        raise ConfigError("there is no position with a target in these rows")
    by_position = [
        {
            "from": int(edges[i]), "to": int(edges[i + 1] - 1), "positions": int(counts[i]),
            "mean": float(sums[i] / counts[i]), **_band(histograms[i].tolist()),
        }
        for i in range(len(counts)) if counts[i]
    ]  # fmt: skip
    by_document = [
        {"document": document, "positions": int(number), "mean": total / number}
        for document, (total, number) in sorted(of_documents.items())
    ]
    ordered = sorted(by_document, key=lambda each: each["mean"])
    step = -(-len(by_document) // _MOST_DOCUMENTS)
    numbers = {
        "rows": min(rows, len(cache)), "of_rows": len(cache), "positions": int(counts.sum()),
        "mean": float(sums.sum() / counts.sum()), "by_position": by_position, "documents": len(by_document),
        "by_document": by_document[::step], "surest": ordered[:_EXTREMES], "least_sure": ordered[::-1][:_EXTREMES],
    }  # fmt: skip
    return Plot(name="entropy", numbers=numbers, draw=_draw, size=(9.2, 4.2))


def _edges(longest: int) -> Any:
    """Edges of bins of tokens read: single ones at first, then four a doubling."""
    powers = 2.0 ** (np.arange(0, 4 * (int(longest).bit_length() + 1)) / 4)
    edges = np.unique(np.round(powers).astype(np.int64))
    return np.append(edges[edges <= longest], longest + 1)


def _band(counts: list[int]) -> dict[str, float]:
    found = quantiles(counts) or {}
    return {level: found[level] for level in ("0.1", "0.5", "0.9")}


def _draw(figure: Any, numbers: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=False)
    bins = numbers["by_position"]
    x = [(one["from"] + one["to"]) / 2 for one in bins]
    left.fill_between(x, [one["0.1"] for one in bins], [one["0.9"] for one in bins], color=COLOURS[0], alpha=0.15,
                      linewidth=0, label="80% of positions")  # fmt: skip
    left.plot(x, [one["mean"] for one in bins], color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.8,
              label="mean")  # fmt: skip
    left.set_xscale("log", base=2)
    ticks = [1 << i for i in range(0, int(x[-1]).bit_length(), 1 + int(x[-1]).bit_length() // 8)]
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.minorticks_off()
    left.set(
        xlabel="tokens read", ylabel="entropy (nats)", title=f"By position: {numbers['positions']:,}", ylim=(0, None)
    )
    finish(left)
    documents = numbers["by_document"]
    sizes = [4 + 30 * min(1.0, one["positions"] / 1000) for one in documents]
    right.scatter([one["document"] for one in documents], [one["mean"] for one in documents], s=sizes,
                  color=COLOURS[1], alpha=0.5, linewidth=0)  # fmt: skip
    right.axhline(numbers["mean"], color=LEVEL, linewidth=1.2, linestyle="--")
    right.annotate(f"mean of positions {numbers['mean']:.2f}", (1, numbers["mean"]), xycoords=("axes fraction", "data"),
                   ha="right", va="bottom", fontsize=9, color=LEVEL,
                   bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})  # fmt: skip
    right.set(xlabel="document (its number in the corpus)", ylabel="mean entropy (nats)",
              title=f"By document: {numbers['documents']:,}", ylim=(0, None))  # fmt: skip
    finish(right)
