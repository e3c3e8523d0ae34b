"""Options of a dump. Importing this module loads no large library: the command line takes its options from here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.corpus.reading_options import ReadingOptions
from kdcache.corpus.rules import require_rules
from kdcache.errors import ConfigError
from kdcache.launcher import LaunchOptions
from kdcache.options import option
from kdcache.position_filter import PositionFilter
from kdcache.stopping import GRACE
from kdcache.teacher.engines.base import TeacherSpec, ranks_of, require_engine

EXTRA_PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""The same as in `kdcache.extras`, which is not imported here because it loads numpy."""

if TYPE_CHECKING:
    from kdcache.selection import Selection

_SELECTION = ("k", "min_k", "top_p", "draws", "adaptive", "force_label", "sample_temperature", "proposal_power")
"""Options that are settings of a selection under the same name."""


def _each(text: str) -> list[str]:
    """The arrays that are asked for in one word: `hidden:6,-1` is `hidden:6` and `hidden:-1`."""
    kind, colon, numbers = text.partition(":")
    return [f"{kind}{colon}{number.strip()}" for number in numbers.split(",")]


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(ReadingOptions):
    """What a corpus is, and how its documents become rows for a teacher.

    Raises:
        ConfigError: a value out of range.
    """

    teacher: str = option(
        "folder, .gguf file or hub name of a causal language model; with --engine server the URL of a served one"
    )
    corpus: str = option(
        ".txt, .jsonl, .json, .parquet or .arrow files, compressed or not: a file, glob, folder or URL of them; "
        "a save_to_disk folder; or hf:NAME[:CONFIG]"
    )
    # corpus
    eos: str = option("end-of-sequence token after each text: auto (as the tokenizer does), always or never", "auto")
    on_bad_record: str = option("a document that cannot be used: skip (left out and counted) or stop", "skip")
    teacher_system: str | None = option(
        "system prompt that the teacher alone reads; before texts, completions and tokens it stands as a text", None
    )
    # rows
    seq_len: int = option("tokens per row", 512)
    teacher_seq_len: int | None = option(
        "tokens that the teacher reads for a piece at most, with what it alone is told (default: twice --seq-len)", None
    )
    pack: str = option(
        "best-fit, or none: a row for each document, for models that cannot keep pieces apart", "best-fit"
    )
    overlong: str = option(
        "a document longer than a row: cut, truncate, drop, or auto (cut text, truncate conversations)", "auto"
    )

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"seq_len is {self.seq_len}, but must be at least 2")
        if self.teacher_seq_len is not None and self.teacher_seq_len < self.seq_len:
            raise ConfigError(f"teacher_seq_len is {self.teacher_seq_len}, but must be at least seq_len {self.seq_len}")
        if self.teacher_system == "":
            raise ConfigError("teacher_system is empty; leave it out")
        require_rules(vars(self))

    def teacher_context(self, told: bool, longest: int | None) -> dict[str, Any]:
        """What a manifest says of what the teacher alone reads; empty where it reads what its student does.

        Args:
            told: whether the corpus says what the teacher reads.
            longest: positions of the teacher; None if unknown.
        """
        if not told and self.teacher_system is None and self.teacher_seq_len is None:
            return {}
        usual = 2 * self.seq_len if longest is None else min(2 * self.seq_len, longest)
        return {"seq_len": self.teacher_seq_len or usual, "system": self.teacher_system}

    @property
    def teacher_spec(self) -> TeacherSpec:
        """Which teacher is meant."""
        return TeacherSpec(model=self.teacher)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What runs a teacher, and how that is set up."""

    engine: str = option(
        "what runs the teacher: transformers, vllm, server (one that is served already), or the engine of a plug-in",
        "transformers",
    )
    engine_python: str | None = option(
        "vllm: Python of the environment that vLLM is installed in (default: this one)", None
    )
    engine_set: tuple[str, ...] = option("NAME=VALUE: a setting of the engine; may be repeated", ())
    tokenizer: str | None = option(
        "server: folder or hub name of the teacher's tokenizer (default: what the server names)", None
    )

    @property
    def engine_options(self) -> dict[str, Any]:
        """All but the engine's name, as `TeacherSpec` takes them."""
        texts = (self.engine_set,) if isinstance(self.engine_set, str) else tuple(self.engine_set)
        return {"engine_python": self.engine_python, "engine_set": texts, "tokenizer": self.tokenizer}


@dataclass(frozen=True, kw_only=True)
class DumpConfig(EngineOptions, CorpusOptions):
    """Settings of one dump, checked when built.

    Raises:
        ConfigError: a value out of range.
    """

    out: str = option("folder or URL of the cache; created, or resumed if it is the same dump")
    # rows
    isolate: bool = option("keep the pieces packed into one row from attending to each other", True)
    # target
    select: str = option(
        "selection, the rule for which entries are kept: topk, topp, sample, ipps, full, or the kind of a plug-in",
        "topk",
    )
    k: int | None = option("entries per position; the maximum for topp, the mean with --adaptive (default: 64)", None)
    min_k: int | None = option("minimum of entries per position, for topp and --adaptive (default: 1)", None)
    top_p: float | None = option("probability mass that topp keeps", None)
    draws: int | None = option("number of draws of sample", None)
    adaptive: bool = option("ipps: one threshold for the whole cache instead of one k; --k is then the mean", False)
    force_label: bool = option("always keep the true next token among the entries", False)
    sample_temperature: float | None = option(
        "temperature of the distribution that sample and ipps draw from (default: 1)", None
    )
    proposal_power: float | None = option(
        "sample: draw from p to this power, with importance weights (default: 1)", None
    )
    set: tuple[str, ...] = option(
        "NAME=VALUE: a setting of the selection that has no option of its own; may be repeated", ()
    )
    positions: str = option(
        "which labelled slots get a target: all, or entropy>X (entropy of the teacher, nats)", "all"
    )
    seed: int = option("seed of the draws", 0)
    temperatures: str = option("comma-separated temperatures at which the exact tail is kept; 1 is always kept", "1")
    # extras
    extra: tuple[str, ...] = option(
        "also keep this array, one vector per token: hidden:N is the state after N layers, hidden:-1 the input of the "
        "output head; several as hidden:6,12,-1; may be repeated",
        (),
    )
    extra_precision: str = option(
        "precision of the extras: float32, float16, bfloat16, or int8 with a scale and the largest few of each vector",
        "float16",
    )
    # store
    store: str = option("arrow, zarr, or the store of a plug-in", "arrow")
    precision: str | None = option(
        "how values are stored: float32, float16, or 4 to 16 bits (default: 6; 8 for full)", None
    )
    docs_per_shard: int | None = option("documents per shard, instead of --chars-per-shard", None)
    chars_per_shard: int | None = option(
        "minimum of characters per shard (default: a 64th of the corpus, from 256 thousand to 16 million)", None
    )
    reuse: tuple[str, ...] = option(
        "cache of the same teacher whose targets are copied for what it holds already; may be repeated", ()
    )
    # compute
    device: str = option("auto, cpu, cuda, cuda:1 or mps", "auto")
    device_map: str | None = option("auto: spread the teacher over several GPUs", None)
    dtype: str = option("auto (float32 on a CPU, else that of the checkpoint), float32, bfloat16 or float16", "auto")
    attn_implementation: str | None = option(
        "attention of the teacher: eager, sdpa, flash_attention_2, ... (default: what transformers takes)", None
    )
    tensor_parallel: int = option("GPUs that hold one teacher together, each a part of every layer", 1)
    batch_rows: int = option("rows per forward pass", 8)
    tile_head: bool = option(
        "run the output head on tiles of positions, so that the logits of a batch are never all in memory", True
    )
    # work
    worker: str | None = option("I/N: this process is worker I of N (default: from SLURM or torchrun, else 0/1)", None)
    grace: float = option("seconds to finish the current shard when a signal stops the dump; then it is dropped", GRACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_rows < 1:
            raise ConfigError(f"batch_rows is {self.batch_rows}, but must be at least 1")
        if self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel is {self.tensor_parallel}, but must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}, but must lie in 0 to 2^63 - 1")
        if not 0 <= self.grace < math.inf:
            raise ConfigError(f"grace is {self.grace}, but must be at least 0")
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
        if self.device_map is not None and self.tensor_parallel > 1:
            raise ConfigError("device_map and tensor_parallel exclude each other: both spread one teacher over GPUs")
        for name in ("extra", "reuse"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "extra", tuple(name for text in self.extra for name in _each(text)))
        if self.extra_precision not in EXTRA_PRECISIONS:
            raise ConfigError(f"extra_precision {self.extra_precision} is not one of {', '.join(EXTRA_PRECISIONS)}")
        if self.extra and not self.tile_head:
            raise ConfigError(
                f"extra {self.extra[0]} is caught where the output head runs in tiles; leave out tile_head=False"
            )
        require_engine(self.engine)
        if self.reuse and ranks_of(self.teacher_spec) > 1:
            raise ConfigError(f"reuse and tensor_parallel exclude each other for the engine {self.engine}")
        object.__setattr__(self, "positions", PositionFilter(self.positions).rule)
        _ = self.stored_temperatures

    @property
    def teacher_spec(self) -> TeacherSpec:
        """Which teacher is run, by which engine, and how."""
        return TeacherSpec(
            model=self.teacher, engine=self.engine, device=self.device, device_map=self.device_map, dtype=self.dtype,
            batch_rows=self.batch_rows, tile_head=self.tile_head, attn_implementation=self.attn_implementation,
            tensor_parallel=self.tensor_parallel, **self.engine_options,
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
        """The temperatures to keep, in the order given; 1 is added at the end if it is missing."""
        try:
            named = tuple(float(t) for t in self.temperatures.split(","))
        except ValueError:
            raise ConfigError(f"temperatures {self.temperatures!r} is not a comma-separated list of numbers") from None
        if len(set(named)) != len(named) or not all(0.01 <= t <= 100 for t in named):
            raise ConfigError(f"temperatures {self.temperatures!r} must be different and lie in 0.01 to 100")
        return named if 1.0 in named else (*named, 1.0)


@dataclass(frozen=True, kw_only=True)
class DumpOptions(LaunchOptions, DumpConfig):
    """Options of `dump-teacher`: a dump, who starts its workers, and whether it makes shards.

    Raises:
        ConfigError: a value out of range.
    """

    create_only: bool = option("create the cache for the workers that come later, and make no shard", False)

    def __post_init__(self) -> None:
        DumpConfig.__post_init__(self)
        self.require_launch("local", "ray")
        for name in ("launch", "worker"):
            if self.create_only and getattr(self, name) is not None:
                raise ConfigError(f"create_only and {name} exclude each other: who creates a cache makes no shard")
        if self.launch is not None and ranks_of(self.teacher_spec) > 1:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}, for which the engine {self.engine} needs the ranks of "
                "torchrun, and launch starts none: start it by torchrun, or use device_map auto"
            )

    @property
    def config(self) -> DumpConfig:
        """The dump alone."""
        return DumpConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DumpConfig)})


@dataclass(frozen=True, kw_only=True)
class CheckOptions(CorpusOptions):
    """Options of `check-data`.

    Raises:
        ConfigError: a value out of range.
    """

    examples: int = option("number of documents to show, with what is supervised marked", 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 0:
            raise ConfigError(f"examples is {self.examples}, but must not be negative")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(DumpConfig):
    """Options of `plan`: those of the dump, and what its cost is set against.

    Raises:
        ConfigError: a value out of range.
    """

    out: str = option("where the cache would be, to see whether its disk has room (default: not looked at)", "")
    batches: int = option("batches that are measured", 4)
    workers: int = option("number of machines like this one that would share the dump", 1)
    price_per_hour: float | None = option("price of one such machine for an hour, in any currency", None)
    student: str | None = option(
        "checkpoint folder, hub name, or a config.json: compare with the teacher inside its training loop", None
    )
    students: int = option("number of such students that would be trained", 1)
    epochs: float = option("passes over the corpus that each of them would make", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batches", "workers", "students"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.epochs < float("inf"):
            raise ConfigError(f"epochs is {self.epochs}, but must be positive")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ConfigError(f"price_per_hour is {self.price_per_hour}, but must be at least 0")
        if self.worker is not None:
            raise ConfigError(f"worker is {self.worker}, but a plan is for all workers together; leave it out")
