"""Options of `distil`. Importing this module loads no large library."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.options import option


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """Options of `distil`.

    Raises:
        ConfigError: options that exclude each other.
    """

    recipe: str = option("TOML file of stages; examples/recipes has some")
    out: str = option("folder under which each stage leaves its result")
    set: tuple[str, ...] = option("NAME=VALUE in place of a value of the recipe's table set; may be repeated", ())
    stage: str | None = option("run this stage alone; what it waits for must be there", None)
    list: bool = option("write each stage's options, show the stages and which results are there, run nothing", False)

    def __post_init__(self) -> None:
        if self.list and self.stage is not None:
            raise ConfigError("list and stage exclude each other")
