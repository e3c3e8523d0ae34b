"""The commands that deal with other tools' caches: `export`, `import` and `audit`. `main.py` registers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.options import option
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
