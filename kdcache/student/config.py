"""What a training run is asked to do. Importing this costs nothing: the command line reads its options here."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.options import option
from kdcache.student.row_filter import parse_rows, parse_where

_CHOICES = {
    "schedule": ("cosine", "wsd", "constant"),
    "soft_schedule": ("constant", "wsd", "cosine", "linear"),
    "dtype": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run, checked when built.

    From Python, `cache` and `pool` may also be one string, and `temperature` a number.

    Raises:
        ConfigError: a value out of range.
    """

    cache: tuple[str, ...] = option("folder or URL of a cache to learn from; PATH:WEIGHT, given again, mixes several")
    pool: tuple[str, ...] = option("cache of another teacher over the same rows; PATH:WEIGHT, and again for more", ())
    student: str = option("checkpoint folder, hub name, or config.json (fresh weights)")
    out: str = option("folder of the trained student; created, or resumed with --resume")
    # objective
    loss: str = option(
        "forward-kl, reverse-kl, skew-kl, skew-reverse-kl, jsd or tvd; jsd:0.9 sets a constant", "forward-kl"
    )
    tail: str = option("what topk leaves out: bucket, none, renormalise, label, label-sample or uniform", "bucket")
    temperature: str = option("T of the distillation term, one that the cache stores; 3:1 steps down through them", "1")
    position_weights: str = option("none, confidence, or entropy-gate:LO:HI (nats of the teacher)", "none")
    soft_weight: float = option("weight of the distillation term; the label term gets the rest", 1.0)
    soft_schedule: str = option("of --soft-weight: constant, wsd (up, level, down), cosine or linear", "constant")
    # length
    steps: int | None = option("optimiser steps  [default: one epoch]", None)
    epochs: float | None = option("passes over the training rows, instead of --steps", None)
    # optimiser
    batch_rows: int = option("rows a forward pass, on each device", 8)
    accumulate: int = option("forward passes an optimiser step", 1)
    lr: float = option("peak learning rate", 5e-4)
    warmup: float = option("share of the steps over which the learning rate rises", 0.05)
    schedule: str = option("cosine, wsd (constant, then down over the last fifth) or constant", "cosine")
    weight_decay: float = option("of AdamW", 0.1)
    # what is trained, and in which memory
    lora: int = option("train adapters of this rank (peft) and leave the weights; 0 trains the weights", 0)
    gradient_checkpointing: bool = option("keep less for the backward pass, and compute it again: slower", False)
    fsdp: bool = option("shard the student over the GPUs of a torchrun (FSDP2) instead of copying it", False)
    # measurement
    heldout: float = option("share of the rows kept for measuring, never trained on", 0.02)
    eval_every: int = option("steps between measurements; 0 for before and after only", 0)
    # which rows
    rows: str | None = option("touch only these rows of each cache: ranges such as 0:1000 or :100,200:300", None)
    where: str | None = option("train only on rows of such mean entropy of the teacher, nats: entropy<2.5", None)
    partial: bool = option("take a cache that is still being dumped: the shards committed when the run begins", False)
    # reading
    readers: int | None = option("processes that read ahead  [default: 2 for a URL, else 0]", None)
    local_copy: str | None = option("keep copies of what is read from a URL in this folder", None)
    local_limit: str = option("the most that the copies there hold together", "20GB")
    record_rows: bool = option("write the rows that each step took into rows-RANK.jsonl", False)
    # the run
    seed: int = option("order of rows and fresh weights", 0)
    resume: bool = option("go on from the newest complete checkpoint in --out", False)
    save_every: int = option("steps between checkpoints", 500)
    keep: int = option("checkpoints to keep", 2)
    log_to: str = option("none, or tensorboard, wandb, or both with a comma: where Trainer logs to", "none")
    device: str = option("auto, cpu, cuda or mps", "auto")
    dtype: str = option("auto (bfloat16 on GPUs that have it), float32 or bfloat16", "auto")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", (self.cache,) if isinstance(self.cache, str) else tuple(self.cache))
        if not self.cache:
            raise ConfigError("cache is missing")
        object.__setattr__(self, "pool", (self.pool,) if isinstance(self.pool, str) else tuple(self.pool))
        if self.pool and len(self.cache) > 1:
            raise ConfigError(
                f"pool needs one cache, not {len(self.cache)}: the rows of a pool are the same for every "
                "teacher, those of a mixture are not"
            )
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
        """The first and the last T of the run.

        Raises:
            ConfigError: not a number, or two of them with a colon between.
        """
        try:
            first, *rest = (float(part) for part in self.temperature.split(":"))
        except ValueError:
            first, rest = 0.0, []
        last = rest[0] if rest else first
        if len(rest) > 1 or not all(0 < t < float("inf") for t in (first, last)):  # NaN included
            raise ConfigError(f"temperature is {self.temperature}, but must be positive, or two such as 3:1")
        return first, last
