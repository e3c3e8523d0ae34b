"""The commands that deal with other tools' caches: `export`, `import` and `audit`. `main.py` registers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from kdcache.options import option
from kdcache.teacher.config import EngineOptions
from kdcache_cli.frame import Output

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `export`."""

    cache: str = option("folder or URL of the cache")
    as_: str = option("parquet, arrow, jsonl, zarr, distillkit, megatron or topk-jsonl")
    out: str = option("the new file; of zarr, distillkit and megatron the new folder")


def export_cache(options: ExportOptions, output: Output) -> None:
    """Write a cache as plain tables or as the files of another tool, and say what those cannot hold."""
    from kdcache.interop.export import export

    with output.progress("export", "rows") as bar:
        summary = export(options.cache, options.out, options.as_, on_progress=bar)

    def show(console: Console) -> None:
        console.print(
            f"{summary['out']}: {summary['as']}, {summary['rows']:,} rows, {summary['positions']:,} positions, "
            f"{summary['bytes']:,} bytes; {summary['seconds']:.1f} s",
            markup=False,
        )

    output.result(summary, show)
    output.advise([f"not in the export: {'; '.join(summary['lost'])}"])


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `import`."""

    source: str = option("file, folder, glob or URL of the other tool's cache")
    as_: str = option("what it is: distillkit, megatron, topk-jsonl or axolotl")
    out: str = option("folder or URL of the cache; created, or resumed if it is the same import")
    teacher: str = option("folder of the teacher that it was made from, or any text that names it")
    tokens: str | None = option("file of input_ids, one record a sequence, for caches that hold no tokens", None)
    tokenizer: str | None = option("folder of the teacher's tokenizer, copied into the cache", None)
    vocab_size: int | None = option("token ids lie below it (default: the tokenizer's, or what the source says)", None)
    store: str = option("arrow, zarr, or the store of a plug-in", "arrow")
    precision: str | None = option("store the values as float32, float16, or 4 to 16 bits (default: 6)", None)
    rows_per_shard: int = option("sequences of a shard", 4096)


def import_cache(options: ImportOptions, output: Output) -> None:
    """Write a cache from one of DistillKit, axolotl or Megatron, or from a server's top-k answers."""
    from kdcache.interop.import_rows import import_cache as read

    with output.progress("import", "rows") as bar:
        summary = read(**vars(options), on_progress=bar)

    def show(console: Console) -> None:
        console.print(
            f"{summary['cache']}: {summary['rows']:,} rows, {summary['positions']:,} positions, "
            f"{summary['entries']:,} entries\n"
            f"{summary['bytes']:,} bytes, {summary['bytes_per_position']:.1f} per position",
            markup=False,
        )

    output.result(summary, show)
    output.advise([*summary["advice"], f"not in the source: {'; '.join(summary['lost'])}"])


@dataclass(frozen=True, kw_only=True)
class AuditOptions(EngineOptions):
    """Options of `audit`."""

    cache: str = option("file or folder of a cache of any tool, or a cache of kdcache")
    teacher: str = option("folder, .gguf file or hub name of the model that is said to have made it")
    as_: str | None = option(
        "its format: kdcache, distillkit, megatron, maxtext, se-kd, topk-jsonl or axolotl (default: by its files)", None
    )
    tokens: str | None = option("file of input_ids, one record a sequence, for caches that hold no tokens", None)
    rows: int = option("how many sequences the teacher runs over", 32)
    seed: int = option("seed of the selection of these", 0)
    device: str = option("auto, cpu, cuda, cuda:1 or mps", "auto")
    dtype: str = option("auto, float32, bfloat16 or float16", "auto")


def audit_cache(options: AuditOptions, output: Output) -> None:
    """Say what is wrong with the targets of anyone's cache, by running its teacher over a sample of it."""
    from kdcache.report.audit import audit

    with output.progress("audit", "rows") as bar:
        found = audit(
            options.cache, options.teacher, as_=options.as_, tokens=options.tokens, rows=options.rows,
            seed=options.seed, device=options.device, dtype=options.dtype, engine=options.engine,
            engine_options=options.engine_options, on_progress=bar,
        )  # fmt: skip

    def show(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for each in found["checks"]:
            figures = {key: value for key, value in each.items() if key not in ("name", "verdict", "what")}
            told = ", ".join(
                f"{key.replace('_', ' ')} {'unknown' if value is None else f'{value:.4g}'}"
                for key, value in figures.items()
            )
            table.add_row(
                Text(each["name"], style="bold"), each["verdict"], Text(each["what"]), Text(told, style="dim")
            )
        console.print(table)
        state = "no fault found" if found["ok"] else "faults found"
        console.print(
            f"{found['cache']} ({found['format']}): {state}, in {found['rows']:,} rows, "
            f"{found['positions']:,} positions", markup=False,
        )  # fmt: skip

    output.result(found, show)
    if not found["ok"]:
        raise typer.Exit(1)
