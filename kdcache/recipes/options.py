"""Options of a stage: values of a TOML file as the fields of a command's dataclass, and a file for `--config`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from kdcache.errors import ConfigError
from kdcache.options import TYPES, parse_value


def leaves_folder(options: type) -> bool:
    """Whether a command writes its result into a folder that it must be given."""
    return any(f.name == "out" and f.default is dataclasses.MISSING for f in dataclasses.fields(options))


def chosen_options(options: type, out: str) -> dict[str, Any]:
    """The options of a command that a recipe sets by itself: where its result goes, and that it goes on with it.

    Args:
        options: the dataclass of the command's options.
        out: the folder of its result.
    """
    chosen: dict[str, Any] = {"out": out} if leaves_folder(options) else {}
    if any(field.name == "resume" for field in dataclasses.fields(options)):
        chosen["resume"] = True
    return chosen


def check_options(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command, each of its field's type, underscores in their names.

    Args:
        options: the dataclass of the command's options.
        given: values of a TOML file, by names with dashes or underscores.

    Raises:
        ConfigError: an option that the command does not have or that is chosen for it, or a value that it cannot take.
    """
    hints, chosen = typing.get_type_hints(options), chosen_options(options, "unwritten")
    values = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise ConfigError(f"it has no option {key}")
        if name in chosen:
            raise ConfigError(f"{key} is chosen by the recipe; leave it out")
        if name == "out":  # a command that refuses a file that is there could not be run again after a kill
            raise ConfigError(f"{key} is not for a stage: what its command finds is kept in its record")
        values[name] = _typed(key, hints[name], value)
    missing = [
        f.name
        for f in dataclasses.fields(options)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        and f.name not in values and f.name not in chosen
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"it needs {' and '.join(missing)}")
    options(**values, **chosen)
    return values


def to_toml(options: Mapping[str, Any]) -> str:
    """A TOML file of options; strings, numbers, truth values and lists of them are written as JSON writes them."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in options.items())


def _typed(name: str, hint: Any, value: Any) -> Any:
    alternatives = [a for a in (typing.get_args(hint) or (hint,)) if a not in (type(None), Ellipsis)]
    if typing.get_origin(hint) in (list, tuple) or any(typing.get_origin(a) in (list, tuple) for a in alternatives):
        inner = hint if typing.get_origin(hint) in (list, tuple) else alternatives[0]
        (item, *_) = typing.get_args(inner)
        return [_typed(name, item, one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    types = {a for a in alternatives if a in TYPES}
    if isinstance(value, str):
        return parse_value(name, value, types) if str not in types else value
    if float in types and type(value) is int and int not in types:
        return float(value)
    if type(value) in types:
        return value
    if str in types and type(value) in (int, float):
        return str(value)
    raise ConfigError(f"{name} is {str(value)[:40]}, but must be {' or '.join(TYPES[t] for t in TYPES if t in types)}")
