"""Options of `generate`. Importing this module loads no large library: the command line takes its options from here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from kdcache.corpus.reading_options import ReadingOptions
from kdcache.errors import ConfigError
from kdcache.launcher import LaunchOptions
from kdcache.options import option
from kdcache.stopping import GRACE

NONE = "none"
"""The name of no prompts."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReadingOptions):
    """What one corpus is, and who writes how much of it.

    Raises:
        ConfigError: a value out of range.
    """

    writer: str = option("folder, .gguf file or hub name of the causal language model that writes")
    prompts: str = option(
        "what it writes behind: texts, conversations, prompts or token ids in any files that a corpus may be; or none, "
        "to write whole documents"
    )
    out: str = option("folder or URL of the corpus; created, or resumed if it is the same")
    # what is written
    samples: int | None = option(
        "completions of each prompt (default: 1); with --prompts none, the number of documents", None
    )
    start: tuple[str, ...] = option(
        "--prompts none: text that documents begin with (default: the beginning-of-sequence token alone); may be "
        "repeated, for one after the other",
        (),
    )
    max_new_tokens: int = option("tokens after which a completion is cut off", 256)
    temperature: float = option("temperature of the draws; 0 takes the most likely token", 1.0)
    top_p: float = option("draw from the most likely tokens that have this mass together", 1.0)
    stop: tuple[str, ...] = option(
        "token that ends a completion, as the tokenizer spells it; may be repeated (default: those that the writer's "
        "files name)",
        (),
    )
    seed: int = option("seed of the draws", 0)
    docs_per_shard: int = option("prompts of a shard, which is the unit of work and one file", 256)
    # compute
    device: str = option("auto, cpu, cuda, cuda:1 or mps", "auto")
    device_map: str | None = option("auto: spread the writer over several GPUs", None)
    dtype: str = option("auto (float32 on a CPU, else that of the checkpoint), float32, bfloat16 or float16", "auto")
    attn_implementation: str | None = option(
        "attention of the writer: eager, sdpa, flash_attention_2, ... (default: what transformers takes)", None
    )
    batch_rows: int = option("completions that are written at once", 16)
    # work
    worker: str | None = option("I/N: this process is worker I of N (default: from SLURM or torchrun, else 0/1)", None)
    grace: float = option("seconds to finish the current shard when a signal stops the work; then it is dropped", GRACE)

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        for name in ("samples", "max_new_tokens", "docs_per_shard", "batch_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature:g}, but must be at least 0")
        if 0 < self.temperature < 0.01:
            raise ConfigError(f"temperature is {self.temperature:g}, but must be 0, or at least 0.01")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p:g}, but must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}, but must lie in 0 to 2^63 - 1")
        if not 0 <= self.grace < math.inf:
            raise ConfigError(f"grace is {self.grace}, but must be at least 0")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype {self.dtype} is not one of auto, float32, bfloat16, float16")
        if self.device_map not in (None, "auto"):
            raise ConfigError(f"device_map {self.device_map} is not auto")
        if self.free and self.samples is None:
            raise ConfigError("prompts is none, which needs samples, the number of documents")
        if self.start and not self.free:
            raise ConfigError(f'start is {self.start[0]!r}, but documents begin with their prompts: use prompts="none"')

    @property
    def free(self) -> bool:
        """Whether whole documents are written, behind no prompt."""
        return self.prompts == NONE


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(LaunchOptions, GenerateConfig):
    """Options of `generate`: a corpus, and who starts the workers that write it.

    Raises:
        ConfigError: a value out of range.
    """

    def __post_init__(self) -> None:
        GenerateConfig.__post_init__(self)
        self.require_launch("local", "ray")

    @property
    def config(self) -> GenerateConfig:
        """The corpus alone."""
        return GenerateConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GenerateConfig)})
