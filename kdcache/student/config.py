"""Options of a training run. Importing this module loads no large library: the command line reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.launcher import LaunchOptions
from kdcache.options import option
from kdcache.student.from_teacher.config import CUTS, CutOptions
from kdcache.student.row_filter import parse_rows, parse_where

_CHOICES = {
    "schedule": ("cosine", "wsd", "constant"),
    "soft_schedule": ("constant", "wsd", "cosine", "linear"),
    "dtype": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    """What a run has beside the cutting of its student; a class of its own so that `--help` begins with it."""

    cache: tuple[str, ...] = option("folder or URL of a cache to learn from; repeat as PATH:WEIGHT to mix several")
    pool: tuple[str, ...] = option(
        "cache of another teacher over the same rows, as PATH or PATH:WEIGHT; may be repeated", ()
    )
    student: str | None = option("checkpoint folder, hub name, or a config.json for random initial weights", None)
    init_from: str | None = option(
        "cut the student out of this teacher instead: see --layers, --hidden, --heads, --intermediate, --experts", None
    )
    align: bool = option(
        "the student has another tokenizer than the cache: align both over the bytes of the text", False
    )
    out: str = option("folder of the trained student; created, or resumed with --resume")
    # objective
    loss: str = option(
        "forward-kl, reverse-kl, skew-kl, skew-reverse-kl, jsd, tvd, adaptive-kl, alpha-beta, decoupled-kl, tail-kl, "
        "sampled-reverse-kl, uld, gold, alm, or a plug-in's; jsd:0.9 sets a constant, a*0.7+b*0.3 sums two by weights",
        "forward-kl",
    )
    tail: str = option(
        "how the mass outside the entries is treated: bucket, none, renormalise, renormalise-both, label, label-sample "
        "or uniform",
        "bucket",
    )
    temperature: str = option(
        "T of the distillation term, one that the cache stores; 3:1 steps through the stored ones from 3 to 1", "1"
    )
    position_weights: str = option(
        "weights in the distillation term: none, confidence, entropy-gate:LO:HI (teacher entropy, nats), "
        "student-entropy or student-entropy-gate:LO:HI",
        "none",
    )
    soft_weight: float = option("weight of the distillation term; the label term gets the rest", 1.0)
    soft_schedule: str = option(
        "schedule of --soft-weight: constant, wsd (warmup, stable, decay), cosine or linear", "constant"
    )
    # length
    steps: int | None = option("optimiser steps (default: one epoch)", None)
    epochs: float | None = option("passes over the training rows, instead of --steps", None)
    # optimiser
    batch_rows: int = option("rows per forward pass on each device", 8)
    accumulate: int = option("forward passes per optimiser step", 1)
    lr: float = option("peak learning rate", 5e-4)
    warmup: float = option("share of the steps over which the learning rate rises", 0.05)
    schedule: str = option(
        "schedule of the learning rate: cosine, wsd (constant, then decay over the last fifth) or constant", "cosine"
    )
    weight_decay: float = option("weight decay of AdamW", 0.1)
    # what is trained, and in which memory
    lora: int = option("train LoRA adapters of this rank (peft) instead of the weights; 0: train the weights", 0)
    gradient_checkpointing: bool = option("recompute activations in the backward pass: less memory, slower", False)
    fsdp: bool = option("shard the student over the GPUs of torchrun (FSDP2) instead of copying it", False)
    # measurement
    heldout: float = option("share of the rows that are measured and never trained on", 0.02)
    eval_every: int = option("steps between measurements of the held-out rows; 0: only before and after", 0)
    # which rows
    rows: str | None = option("use only these rows of each cache: ranges such as 0:1000 or :100,200:300", None)
    where: str | None = option(
        "train only on rows whose mean teacher entropy (nats) satisfies this, e.g. entropy<2.5", None
    )
    partial: bool = option(
        "accept a cache that is still being dumped: use the shards that are committed when the run begins", False
    )
    # reading
    readers: int | None = option("processes that read batches ahead (default: 2 for a URL, else 0)", None)
    local_copy: str | None = option("folder for local copies of what is read from a URL", None)
    local_limit: str = option("maximum size of all local copies together", "20GB")
    record_rows: bool = option("write the rows of each step into rows-RANK.jsonl", False)
    # the run
    seed: int = option("seed of the order of rows and of random initial weights", 0)
    resume: bool = option("continue from the newest complete checkpoint in --out", False)
    save_every: int = option("steps between checkpoints", 500)
    keep: int = option("how many checkpoints to keep", 2)
    log_to: str = option("where Trainer logs: none, tensorboard, wandb, or tensorboard,wandb", "none")
    device: str = option("auto, cpu, cuda or mps", "auto")
    dtype: str = option("auto (bfloat16 on GPUs that support it), float32 or bfloat16", "auto")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CutOptions, _RunOptions):
    """Settings of one training run, checked when built.

    From Python, `cache` and `pool` may also be one string, and `temperature` a number.

    Raises:
        ConfigError: a value out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_start()
        object.__setattr__(self, "cache", (self.cache,) if isinstance(self.cache, str) else tuple(self.cache))
        if not self.cache:
            raise ConfigError("cache is missing")
        object.__setattr__(self, "pool", (self.pool,) if isinstance(self.pool, str) else tuple(self.pool))
        if self.pool and len(self.cache) > 1:
            raise ConfigError(
                f"pool needs one cache, not {len(self.cache)}: the rows of a pool are the same for every "
                "teacher, those of a mixture are not"
            )
        for name in ("pool", "init_from"):
            if self.align and getattr(self, name):
                raise ConfigError(f"align and {name} exclude each other")
        parse_rows(self.rows)
        parse_where(self.where)
        least_of = {"batch_rows": 1, "accumulate": 1, "save_every": 1, "keep": 1, "eval_every": 0, "seed": 0, "lora": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.readers is not None and self.readers < 0:
            raise ConfigError(f"readers is {self.readers}, but must be at least 0")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs exclude each other")
        object.__setattr__(self, "temperature", str(self.temperature))  # from Python a number will do
        object.__setattr__(self, "temperature", ":".join(f"{t:g}" for t in dict.fromkeys(self.temperature_ends())))
        for name in ("steps", "epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}, but must be positive")
        for name in ("soft_weight", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must lie in [0, 1]")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}, but must lie between 0 and 1")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)} is not one of {', '.join(known)}")
        self.trackers()
        if self.lora and self.fsdp:
            raise ConfigError("lora and fsdp exclude each other: adapters are small enough to be copied")

    def _require_start(self) -> None:
        if self.student is not None and self.init_from is not None:
            raise ConfigError("student and init_from exclude each other")
        if self.student is None and self.init_from is None:
            raise ConfigError("student is missing: give a checkpoint, a config.json, or a teacher as init_from")
        if self.init_from is None and self.cuts:
            given = next(name for name in CUTS if getattr(self, name) is not None)
            raise ConfigError(f"{given} needs a teacher to cut the student out of, as init_from")

    @property
    def start(self) -> str:
        """What the student begins from: a checkpoint, a config.json, or the teacher that it is cut out of."""
        return self.student or self.init_from or ""

    def trackers(self) -> list[str]:
        """The trackers that `log_to` names.

        Raises:
            ConfigError: a name that is not known.
        """
        names = [] if self.log_to == "none" else [name.strip() for name in self.log_to.split(",")]
        if set(names) - {"tensorboard", "wandb"}:
            raise ConfigError(f"log_to {self.log_to} is not none, tensorboard, wandb, or both of them with a comma")
        return names

    def temperature_ends(self) -> tuple[float, float]:
        """The first and the last temperature of the run.

        Raises:
            ConfigError: not a positive number, or two of them separated by a colon.
        """
        try:
            first, *rest = (float(part) for part in self.temperature.split(":"))
        except ValueError:
            first, rest = 0.0, []
        last = rest[0] if rest else first
        if len(rest) > 1 or not all(0 < t < float("inf") for t in (first, last)):  # NaN included
            raise ConfigError(f"temperature is {self.temperature}, but must be positive, or two such as 3:1")
        return first, last


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LaunchOptions, TrainConfig):
    """Options of `train-student`: a run, and who starts its ranks.

    Raises:
        ConfigError: a value out of range.
    """

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        self.require_launch("ray")

    @property
    def config(self) -> TrainConfig:
        """The run alone."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})
