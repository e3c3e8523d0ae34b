"""Options: a dataclass field that is also an option of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field
from typing import Any

from kdcache.errors import ConfigError

TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""Types that an option's text may have, in words."""


def option(help: str, default: Any = MISSING) -> Any:
    """A field with a help text; without a default it must be given."""
    return field(default=default, metadata={"help": help})


def split_settings(option: str, texts: Iterable[str]) -> dict[str, str]:
    """The texts of settings by name, from texts `NAME=VALUE`.

    Raises:
        ConfigError: a text that is none, or names a setting twice; it names the option.
    """
    given: dict[str, str] = {}
    for text in texts:
        name, found, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not found or not name.isidentifier():
            raise ConfigError(f"{option} is {text!r}, but must be NAME=VALUE")
        if name in given:
            raise ConfigError(f"{option} names {name}, which is given already")
        given[name] = value.strip()
    return given


def parse_value(name: str, text: str, types: set[type]) -> Any:
    """A value of one of some types from a text; a number where both a number and a text are possible.

    Raises:
        ConfigError: it is of none of them.
    """
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for type_ in (int, float):
        if type_ in types:
            try:
                return type_(text)
            except ValueError:
                pass
    if str in types:
        return text
    raise ConfigError(f"{name} is {text[:40]}, but must be {' or '.join(TYPES[t] for t in TYPES if t in types)}")


def parse_settings(option: str, texts: Iterable[str], types: Mapping[str, type]) -> dict[str, Any]:
    """Settings by name, from texts `NAME=VALUE`.

    Args:
        option: that the texts are given by, for messages.
        texts: the settings.
        types: those that there are, and the type of each.

    Raises:
        ConfigError: another setting, or a value of another type.
    """
    given = split_settings(option, texts)
    for name in given:
        if name not in types:
            raise ConfigError(f"{option} names {name}, which is none of {', '.join(sorted(types)) or 'no settings'}")
    return {name: parse_value(name, text, {types[name]}) for name, text in given.items()}
