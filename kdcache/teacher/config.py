"""What a dump is asked to do. Importing this costs nothing: the command line reads its options here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError
from kdcache.options import option
from kdcache.position_filter import PositionFilter
from kdcache.teacher.engines.base import TeacherSpec, require_engine

EXTRA_PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""Those of `kdcache.extras`, which this file does not import because it would load torch."""

if TYPE_CHECKING:
    from kdcache.selection import Selection

_SELECTION = ("k", "min_k", "top_p", "draws", "adaptive", "force_label", "sample_temperature", "proposal_power")
"""Options that are settings of a kind of selection by the same name."""


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """Settings of one dump, checked when built.

    Raises:
        ConfigError: a value out of range.
    """

    teacher: str = option("folder or hub name of a causal language model")
    corpus: str = option(".txt, .jsonl, .parquet, .arrow file or glob, save_to_disk folder, hf:NAME[:CONFIG]")
    out: str = option("folder or URL (s3://...) of the cache; made, or gone on with")
    # corpus
    text_column: str | None = option("column of texts  [default: text]", None)
    messages_column: str | None = option("column of conversations  [default: messages]", None)
    split: str = option("split of hf: corpora", "train")
    split_text: str = option("a document of a .txt: paragraph, line or file", "paragraph")
    min_chars: int = option("drop shorter documents", 0)
    drop: str | None = option("drop documents in which this regular expression is found", None)
    limit_docs: int | None = option("use only the first documents", None)
    # rows
    seq_len: int = option("tokens a row", 512)
    isolate: bool = option("keep packed pieces from seeing each other", True)
    # target
    select: str = option("which entries to keep: topk, topp, sample, ipps, full, or the kind of a plug-in", "topk")
    k: int | None = option(
        "entries a position; the most of them for topp, the mean with --adaptive  [default: 64]", None
    )
    min_k: int | None = option("the fewest entries, for topp and --adaptive  [default: 1]", None)
    top_p: float | None = option("mass that topp keeps", None)
    draws: int | None = option("draws of sample", None)
    adaptive: bool = option("ipps: one threshold for the whole cache instead of one k", False)
    force_label: bool = option("the true next token is always among the entries", False)
    sample_temperature: float | None = option("T of what sample and ipps draw from  [default: 1]", None)
    proposal_power: float | None = option("sample: draw from p to this power, weighted  [default: 1]", None)
    set: tuple[str, ...] = option("a setting of the kind of selection that has no option here: --set NAME=VALUE", ())
    positions: str = option("which labelled positions carry a target: all, or entropy>X (nats, of the teacher)", "all")
    seed: int = option("of the draws", 0)
    temperatures: str = option("comma-separated T whose exact tails are kept", "1")
    # extras
    extra: tuple[str, ...] = option("keep this too, one vector a token: hidden:-1, what the output head is given", ())
    extra_precision: str = option("of extras: float32, float16, bfloat16, or int8 with a scale a vector", "float16")
    # store
    store: str = option("arrow, zarr, or a store that was registered", "arrow")
    precision: str | None = option("float32, float16, or 4 to 16 bits a value  [default: 6, and 8 for full]", None)
    docs_per_shard: int | None = option("documents a shard  [default: as many as --chars-per-shard asks for]", None)
    chars_per_shard: int | None = option(
        "characters a shard, at least  [default: a 64th of the corpus, 256 thousand to 16 million]", None
    )
    # compute
    engine: str = option("what runs the teacher: transformers, or one that a plug-in registers", "transformers")
    device: str = option("auto, cpu, cuda, cuda:1, mps", "auto")
    device_map: str | None = option("auto spreads the teacher over several GPUs", None)
    dtype: str = option("auto (float32 on a CPU, the checkpoint's elsewhere), float32, bfloat16, float16", "auto")
    batch_rows: int = option("rows a forward pass", 8)
    tile_head: bool = option("run the output head over tiles of positions", True)
    # work
    worker: str | None = option("I/N: this is worker I of N  [default: from SLURM or torchrun, else 0/1]", None)

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("batch_rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}, but must lie in 0 to 2^63 - 1")
        for name in ("docs_per_shard", "chars_per_shard"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.docs_per_shard is not None and self.chars_per_shard is not None:
            raise ConfigError("docs_per_shard and chars_per_shard exclude each other")
        from kdcache.store.registry import find_store  # which loads the libraries that `--help` does without

        find_store(self.store)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype {self.dtype} is not one of auto, float32, bfloat16, float16")
        if self.device_map not in (None, "auto"):
            raise ConfigError(f"device_map {self.device_map} is not auto")
        object.__setattr__(self, "extra", (self.extra,) if isinstance(self.extra, str) else tuple(self.extra))
        if self.extra_precision not in EXTRA_PRECISIONS:
            raise ConfigError(f"extra_precision {self.extra_precision} is not one of {', '.join(EXTRA_PRECISIONS)}")
        if self.extra and not self.tile_head:
            raise ConfigError(
                f"extra {self.extra[0]} is what the output head is given, so it needs the head in tiles; leave out "
                "tile_head=False"
            )
        require_engine(self.engine)
        object.__setattr__(self, "positions", PositionFilter(self.positions).rule)
        _ = self.stored_temperatures

    @property
    def teacher_spec(self) -> TeacherSpec:
        """Which teacher is run, by which engine, and how."""
        return TeacherSpec(
            model=self.teacher, engine=self.engine, device=self.device, device_map=self.device_map, dtype=self.dtype,
            batch_rows=self.batch_rows, tile_head=self.tile_head,
        )  # fmt: skip

    @property
    def rule(self) -> Selection:
        """The selection.

        Raises:
            ConfigError: an unknown kind, or settings that it does not take.
        """
        from kdcache.selection import Selection

        options = {name: getattr(self, name) for name in _SELECTION}
        return Selection.from_options(self.select, options, self.set)

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """The temperatures to keep, in the order named; 1 is added at the end when it is not among them."""
        try:
            named = tuple(float(t) for t in self.temperatures.split(","))
        except ValueError:
            raise ConfigError(f"temperatures {self.temperatures!r} is not a comma-separated list of numbers") from None
        if len(set(named)) != len(named) or not all(0.01 <= t <= 100 for t in named):
            raise ConfigError(f"temperatures {self.temperatures!r} must be different and lie in 0.01 to 100")
        return named if 1.0 in named else (*named, 1.0)
