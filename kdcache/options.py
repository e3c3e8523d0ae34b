"""Options: a dataclass field that is also an option of the command line."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def option(help: str, default: Any = MISSING) -> Any:
    """A field with a help text; without a default it must be given."""
    return field(default=default, metadata={"help": help})
