"""Model card: what people read of a run when it is over.

    README.md    a model card: from what the student was distilled, how, how well, and the command that repeats it
    curves.png   loss, nll, KL and learning rate over the steps, where matplotlib is installed

Both depend on the configuration, the cache and the figures only, on no clock and no path of this machine beyond the
names that were given. So a run that was resumed leaves the card of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import kdcache
from kdcache.errors import ConfigError
from kdcache.store.manifest import Manifest
from kdcache.student.config import TrainConfig
from kdcache.student.curves import curves_of, draw_run
from kdcache.student.from_teacher.config import CUTS

CARD, CURVES = "README.md", "curves.png"

_FIGURES = ("nll", "teacher_nll", "delta_nll", "kl", "top1_agreement", "ece", "acceptance", "acceptance_low",
            "acceptance_high", "bits_per_byte", "teacher_bits_per_byte", "aligned_bytes", "positions",
            "targets")  # fmt: skip
_NOT_TO_REPEAT = ("resume",)


def versions() -> dict[str, str]:
    """The versions of python and of the libraries that decide a result."""
    return {
        "kdcache": kdcache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_record(
    out: Path,
    metrics: Path,
    config: TrainConfig,
    caches: Mapping[str, Manifest],
    rows_per_step: int,
    summary: dict[str, Any],
) -> str | None:
    """Write the card and draw the curves of a run that has ended.

    Args:
        out: its folder.
        metrics: its `metrics.jsonl`.
        config: as given.
        caches: manifests of what the student learned from, by the names that were given.
        rows_per_step: of all ranks.
        summary: `steps`, `rows{train, heldout}` and `heldout{before, after}` of the run.

    Returns:
        The file name of the curves; None, and nothing drawn, without matplotlib.
    """
    curves: str | None = CURVES
    try:
        draw_run(out / CURVES, curves_of(metrics, summary))
    except ConfigError:  # no matplotlib: a run must not fail at its end for want of a picture
        curves = None
    card = make_card(config, caches, rows_per_step, summary, curves)
    (out / CARD).write_text(card, encoding="utf-8")
    return curves


def make_card(
    config: TrainConfig,
    caches: Mapping[str, Manifest],
    rows_per_step: int,
    summary: dict[str, Any],
    curves: str | None,
) -> str:
    """The model card, as Markdown with the front matter of the hub. For its arguments see `write_record`."""
    teachers = list(dict.fromkeys(str(m.origin.get("teacher") or "an unnamed teacher") for m in caches.values()))
    rows = summary["rows"]
    parts = [
        _front_matter(config),
        f"# {_plain(Path(config.out).name or 'student')}",
        f"A language model distilled from {' and '.join(map(_code, teachers))} with kdcache {kdcache.__version__}: it "
        "learned from stored targets, a sparse picture of the teacher's distribution at each token, and no teacher "
        "ran during the training.",
        "## Distilled from",
        _table(["", *(_code(name) for name in caches)], _sources(list(caches.values()))),
        "## How",
        _table(["", ""], [
            ("student", f"{_code(config.start)}, {_start(config)}"),
            ("loss", f"{_code(config.loss)}, tail {_code(config.tail)}"),
            ("temperature", config.temperature),
            ("weight of the distillation term", f"{config.soft_weight:g}, {config.soft_schedule}"),
            ("position weights", _code(config.position_weights)),
            ("steps", f"{summary['steps']:,}, of {rows_per_step} rows each"),
            ("rows", f"{rows['train']:,} trained on, {rows['heldout']:,} held out"),
            ("optimiser", f"AdamW, weight decay {config.weight_decay:g}"),
            ("trained", f"adapters of rank {config.lora}, merged" if config.lora else "all weights"),
            ("learning rate", f"{config.lr:g}, {config.schedule}, warmup {config.warmup:g}"),
            ("dtype, seed", f"{config.dtype}, {config.seed}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ]),
        "## Held-out figures",
        _figures(summary["heldout"]["before"], summary["heldout"]["after"]),
        "On rows that were never trained on, at T = 1, in nats where a unit applies.",
        *([f"![loss, nll, KL and learning rate over the steps]({curves})"] if curves else []),
        "## To repeat",
        f"```sh\n{command(config)}\n```",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def command(config: TrainConfig) -> str:
    """The command of a configuration: what differs from the defaults, quoted for a shell."""
    words = ["kdcache", "train-student"]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if value == field.default or field.name in _NOT_TO_REPEAT:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return shlex.join(words)


def _front_matter(config: TrainConfig) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if not _is_fresh(config):
        path = Path(config.start).expanduser()
        base = path.resolve().name if path.exists() else config.start  # the hub knows names, and no paths
        lines.append(f"base_model: {json.dumps(base, ensure_ascii=False)}")  # JSON is YAML
    return "\n".join(["---", *lines, "tags:", "- distillation", "- kdcache", "---"])


def _is_fresh(config: TrainConfig) -> bool:
    return Path(config.start).suffix == ".json"


def _start(config: TrainConfig) -> str:
    if config.init_from is not None:
        named = {name: getattr(config, name) for name in CUTS if getattr(config, name) is not None}
        return "cut out of it: " + (", ".join(f"{name} {_code(value)}" for name, value in named.items()) or "all of it")
    return f"fresh weights from seed {config.seed}" if _is_fresh(config) else "its own weights to begin with"


def _sources(manifests: Sequence[Manifest]) -> list[tuple[str, ...]]:
    def row(name: str, of: Any) -> tuple[str, ...]:
        return (name, *(of(manifest) for manifest in manifests))

    return [
        row("teacher", lambda m: _code(m.origin.get("teacher") or "not recorded")),
        row("teacher's sha256", lambda m: _code(m.teacher_sha256)),
        row("corpus", lambda m: _code(m.origin.get("corpus") or "not recorded")),
        row("corpus's sha256", lambda m: _code(m.corpus_sha256)),
        row("selection", lambda m: _code(" ".join(f"{k}={v}" for k, v in m.selection.items()))),
        row("positions", lambda m: _code(m.positions)),
        row("temperatures", lambda m: ", ".join(f"{t:g}" for t in m.temperatures)),
        row("precision", lambda m: m.precision if m.precision.startswith("float") else f"{m.precision} bits a value"),
        row("slots of a row", lambda m: str(m.seq_len)),
        row("cache's sha256", lambda m: _code(m.sha256)),
    ]


def _figures(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = []
    for name in _FIGURES:
        values = [figures.get(name) for figures in (before, after)]
        if any(value is not None for value in values):
            label = f"kl ({after.get('kl_kind')})" if name == "kl" else name.replace("_", " ")
            rows.append((label, *("" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values)))
    return _table(["", "before", "after"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(value: Any) -> str:
    """A name from anywhere, on one line, that ends neither a table's cell nor a code span."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "¦")


def _code(value: Any) -> str:
    return f"`{_plain(value)}`"
