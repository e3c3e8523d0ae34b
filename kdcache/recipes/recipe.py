"""A recipe: stages, each an ordinary command, whose options may name what other stages leave.

    [set]                         values that options may name, as {teacher}; `--set teacher=DIR` replaces them
    teacher = "models/teacher"

    [stages.dump]                 a stage: a command, and its options
    command = "dump-teacher"
    teacher = "{teacher}"

    [stages.train]
    command = "train-student"
    cache = "{dump}"              the folder that the stage dump leaves, so this stage waits for it
    after = ["check"]             stages that it waits for besides

    [rounds]                      stages that are run again and again
    count = 2
    first = { learn = "{train}" } what {previous.learn} is in the first round

    [rounds.stages.write]
    command = "generate"
    writer = "{previous.learn}"   what the stage learn of the round before has left
    seed = "{round}"              the number of the round, from 1

Inside a round {write} is what the stage write of the same round leaves, and `{every.write}`, as an item of a list, what
it has left in each round so far. Outside, {learn} is that of the last round, and {every.learn} that of each.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError, one_line
from kdcache.options import parse_value, split_settings
from kdcache.recipes.options import check_options, chosen_options, leaves_folder
from kdcache.store.sealed_json import canonical

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_PARTS = {"set": dict, "stages": dict, "rounds": dict}
_MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Stage:
    """A command to run.

    Attributes:
        name: of the stage; of one in a round `round-2/learn`.
        command: of kdcache.
        options: its options, checked; without what the recipe chooses by itself.
        chosen: what the recipe chooses: `out`, the folder of its result, unless it leaves none; `resume`, where the
            command must be told to go on.
        needs: the stages that it waits for, sorted.
        identity: sha256 of its command, its options, and the identities of the stages that it waits for.
    """

    name: str
    command: str
    options: dict[str, Any]
    chosen: dict[str, Any]
    needs: tuple[str, ...]
    identity: str

    @property
    def leaves_folder(self) -> bool:
        """Whether its result is a folder, of its name."""
        return "out" in self.chosen


@dataclass
class _Raw:
    """A stage as the file has it, and how its references are looked up."""

    table: dict[str, Any]
    find: Callable[[str], list[Any]]
    needs: set[str] = field(default_factory=set)


def read_recipe(path: Path, settings: Sequence[str], out: Path, commands: Mapping[str, type]) -> tuple[Stage, ...]:
    """Read a recipe.

    Args:
        path: of the TOML file.
        settings: texts NAME=VALUE that replace values of `[set]`.
        out: the folder under which stages leave their results.
        commands: the options of each command that a stage may be.

    Returns:
        The stages in the order in which they are run: each after those that it waits for, else as in the file.

    Raises:
        ConfigError: in one sentence, what is wrong with it.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {one_line(error)}") from None
    try:
        return _Reader(fields, settings, out, commands).stages()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Reader:
    def __init__(
        self, fields: dict[str, Any], settings: Sequence[str], out: Path, commands: Mapping[str, type]
    ) -> None:
        for name, value in fields.items():
            if name not in _PARTS or not isinstance(value, dict):
                raise ConfigError(f"{name} is none of its tables {', '.join(_PARTS)}")
        self._out, self._commands = out, commands
        self._set = _replaced(fields.get("set", {}), settings)
        self._outer: dict[str, Any] = _tables(fields.get("stages", {}), "stages")
        rounds = fields.get("rounds", {})
        unknown = rounds.keys() - {"count", "first", "stages"}
        if unknown:
            raise ConfigError(f"rounds has {sorted(unknown)[0]}, which is none of count, first, stages")
        self._inner: dict[str, Any] = _tables(rounds.get("stages", {}), "rounds.stages")
        self._first = rounds.get("first", {})
        self._count = rounds.get("count", 0)
        if isinstance(self._count, str):
            self._count = self._value(self._count, self._find_outside, set())
        if type(self._count) is not int or not 0 <= self._count <= _MOST_ROUNDS or (self._inner and not self._count):
            raise ConfigError(f"rounds.count is {self._count!r}, but must be a whole number from 1 to {_MOST_ROUNDS}")
        if not isinstance(self._first, dict) or self._first.keys() - self._inner.keys():
            raise ConfigError("rounds.first must be a table of stages of the rounds")
        if not self._outer and not self._inner:
            raise ConfigError("it has no stages")
        for name in (*self._outer, *self._inner):
            if not _NAME.fullmatch(name) or name in ("round", "stages") or name in self._set:
                raise ConfigError(f"a stage cannot be named {name}: use small letters, digits and -, and no name twice")
            if name in self._outer and name in self._inner:
                raise ConfigError(f"the stage {name} is in stages and in rounds")

    def stages(self) -> tuple[Stage, ...]:
        raw = {name: _Raw(table, self._find_outside) for name, table in self._outer.items()}
        for number in range(1, self._count + 1):
            for name, table in self._inner.items():
                raw[f"round-{number}/{name}"] = _Raw(table, lambda text, n=number: self._find_inside(text, n))  # type: ignore[misc]
        made = {name: self._resolved(name, one) for name, one in raw.items()}
        stages: dict[str, Stage] = {}
        for name in _ordered({name: one.needs for name, one in raw.items()}):
            command, options = made[name]
            needs = tuple(sorted(raw[name].needs))
            known = {"command": command, "options": options, "needs": {n: stages[n].identity for n in needs}}
            identity = hashlib.sha256(canonical(known)).hexdigest()
            chosen = chosen_options(self._commands[command], str(self._out / name))
            stages[name] = Stage(name, command, options, chosen, needs, identity)
        return tuple(stages.values())

    def _resolved(self, name: str, raw: _Raw) -> tuple[str, dict[str, Any]]:
        """The command of a stage and its options; what it waits for is noted in `raw`."""
        given = dict(raw.table)
        command, after = given.pop("command", name.rpartition("/")[2]), given.pop("after", [])
        if command not in self._commands:
            raise ConfigError(f"stage {name}: {command!r} is none of {', '.join(self._commands)}")
        try:
            if not isinstance(after, list):
                raise ConfigError("after must be a list of stages")
            for text in after:
                self._note(raw.find(str(text)), raw.needs, str(text))
            values = {key: self._value(value, raw.find, raw.needs) for key, value in given.items()}
            options = check_options(self._commands[command], values)
        except ConfigError as error:
            raise ConfigError(f"stage {name} ({command}): {error}") from None
        return command, options

    def _value(self, value: Any, find: Callable[[str], list[Any]], needs: set[str]) -> Any:
        """A value of the file with its references replaced."""
        if isinstance(value, list):
            items = []
            for item in value:
                whole = _REFERENCE.fullmatch(item) if isinstance(item, str) else None
                if whole:
                    items += [self._said(found, needs, whole[1]) for found in find(whole[1])]
                else:
                    items.append(self._value(item, find, needs))
            return items
        if not isinstance(value, str):
            return value

        def one(name: str) -> Any:
            found = find(name)
            if len(found) != 1:
                raise ConfigError(f"{{{name}}} is several, so it must be an item of a list")
            return self._said(found[0], needs, name)

        whole = _REFERENCE.fullmatch(value)
        return one(whole[1]) if whole else _REFERENCE.sub(lambda match: str(one(match[1])), value)

    def _said(self, found: Any, needs: set[str], text: str) -> Any:
        """What a reference stands for: a value, or the folder of a stage."""
        if not isinstance(found, _Result):
            return found
        needs.add(found.stage)
        table = self._outer.get(found.stage) or self._inner[found.stage.rpartition("/")[2]]
        command = table.get("command", found.stage.rpartition("/")[2])
        if command in self._commands and not leaves_folder(self._commands[command]):
            raise ConfigError(f"{{{text}}} is no folder: {command} leaves none; to wait for it, use after")
        return str(self._out / found.stage)

    def _note(self, found: list[Any], needs: set[str], text: str) -> None:
        if not all(isinstance(one, _Result) for one in found):
            raise ConfigError(f"after names {text}, which is no stage")
        needs.update(one.stage for one in found)

    def _find_outside(self, name: str) -> list[Any]:
        base, dot, stage = name.partition(".")
        if dot and base == "every" and stage in self._inner:
            return [_Result(f"round-{n}/{stage}") for n in range(1, self._count + 1)]
        if name in self._inner:
            return [_Result(f"round-{self._count}/{name}")]
        if name in self._outer:
            return [_Result(name)]
        if name in self._set:
            return [self._set[name]]
        raise ConfigError(f"{{{name}}} is no stage and no value of set")

    def _find_inside(self, name: str, number: int) -> list[Any]:
        base, dot, stage = name.partition(".")
        if name == "round":
            return [number]
        if name in self._inner:
            return [_Result(f"round-{number}/{name}")]
        if dot and stage in self._inner:
            if base == "every":
                return [_Result(f"round-{n}/{stage}") for n in range(1, number + 1)]
            if base == "previous" and number > 1:
                return [_Result(f"round-{number - 1}/{stage}")]
            if base == "previous" and stage in self._first:
                first = self._first[stage]
                whole = _REFERENCE.fullmatch(first) if isinstance(first, str) else None
                return self._find_outside(whole[1]) if whole else [first]
            if base == "previous":
                raise ConfigError(f"{{{name}}} has no meaning in the first round: say what it is in rounds.first")
        return self._find_outside(name)


@dataclass(frozen=True)
class _Result:
    """What a stage leaves."""

    stage: str


def _tables(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise ConfigError(f"{where} must hold tables, one a stage")
    return value


def _replaced(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The values of `[set]`, those of `settings` in place of them, each of the type that it has in the file."""
    for name, value in values.items():
        if type(value) not in (str, int, float, bool, list):
            raise ConfigError(f"set.{name} is neither text nor number nor list")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name, text in split_settings("set", settings).items():
        if name not in values:
            raise ConfigError(f"set names {name}, which is none of {', '.join(sorted(values)) or 'no values'}")
        old = values[name]
        if isinstance(old, list):
            kinds = {type(item) for item in old} or {str}
            values[name] = [parse_value(name, part, kinds) for part in text.split(",")]
        else:
            values[name] = parse_value(name, text, {type(old)})
    return values


def _ordered(needs: Mapping[str, set[str]]) -> list[str]:
    """Names, each after those that it needs; what may come first does, in the order given.

    Raises:
        ConfigError: some of them wait for each other.
    """
    order: list[str] = []
    waiting = list(needs)
    while waiting:
        ready = next((name for name in waiting if needs[name] <= set(order)), None)
        if ready is None:
            raise ConfigError(f"the stages {', '.join(waiting)} wait for each other")
        order.append(ready)
        waiting.remove(ready)
    return order
