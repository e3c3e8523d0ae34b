"""Options of a student that is cut out of its teacher. Importing this module loads no large library."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.options import option
from kdcache.student.from_teacher.layers import LayerRule

CUTS = ("layers", "hidden", "heads", "intermediate", "experts")
"""Options that leave something out."""


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What is kept of a teacher; whatever is not named is kept whole.

    Raises:
        ConfigError: a value out of range.
    """

    layers: str | None = option(
        "layers of the teacher to keep: numbers from 0 such as 0,3,7, or every-2, first-8, or best-8: those that the "
        "teacher misses most on the cache",
        None,
    )
    hidden: int | None = option("hidden size to keep: the channels of the teacher with the largest activations", None)
    heads: int | None = option("attention heads to keep in each layer; heads that share a key stay together", None)
    intermediate: int | None = option("neurons to keep in each MLP", None)
    experts: int | None = option("experts to keep in each layer of a mixture", None)
    importance_rows: int | None = option(
        "rows over which importance is measured; by default 16 for heads, ..., and about 500 positions for layers",
        None,
    )

    def __post_init__(self) -> None:
        LayerRule.parse(self.layers)
        for name in (*CUTS[1:], "importance_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")

    @property
    def narrows(self) -> bool:
        """Whether anything but layers is left out."""
        return any(getattr(self, name) is not None for name in CUTS[1:])

    @property
    def cuts(self) -> bool:
        """Whether anything is left out."""
        return self.narrows or self.layers is not None


@dataclass(frozen=True, kw_only=True)
class _MakeOptions:
    """What `make-student` has beside the cutting; a class of its own so that `--help` begins with it."""

    teacher: str = option("folder, .gguf file or hub name of the teacher")
    out: str = option("folder of the student; must not exist, unless the same command has made it")
    cache: str | None = option(
        "folder or URL of a cache of the teacher: importance is measured on its training rows, the KL before any "
        "training on its held-out rows",
        None,
    )
    text: str | None = option("text file on which the importance of heads, ... is measured, without a cache", None)
    heldout: float = option("share of the rows of the cache that the KL is measured on; as for train-student", 0.02)
    batch_rows: int = option("rows per forward pass", 8)
    device: str = option("auto, cpu, cuda or mps", "auto")


@dataclass(frozen=True, kw_only=True)
class MakeStudentOptions(CutOptions, _MakeOptions):
    """Options of `make-student`.

    Raises:
        ConfigError: a value out of range, or nothing to measure importance on.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None and self.text is not None:
            raise ConfigError("cache and text exclude each other")
        if LayerRule.parse(self.layers).best and self.cache is None:
            raise ConfigError(f"layers {self.layers} needs a cache of the teacher, to measure what each layer is worth")
        if self.narrows and self.cache is None and self.text is None:
            given = next(name for name in CUTS[1:] if getattr(self, name) is not None)
            raise ConfigError(f"{given} needs a cache of the teacher, or a text, to measure what matters on")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}, but must lie between 0 and 1")
        if self.batch_rows < 1:
            raise ConfigError(f"batch_rows is {self.batch_rows}, but must be at least 1")
