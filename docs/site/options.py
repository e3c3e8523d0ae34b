"""Writes the options of each command into its page: `python docs/site/options.py` changes docs/commands/*.md.

They come from the command line itself, as `--help` shows them; a test asks whether the pages are current. Only what
stands between the two marks of a page is written; where a page has no marks, it gets them at its end.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kdcache_cli.main  # noqa: F401 - it registers the commands
from kdcache_cli.frame import ARGUMENTS_OF, OPTIONS_OF, flag_of
from kdcache_cli.help_groups import EVERY, GROUPS, group_of

FOLDER = Path(__file__).parents[1] / "commands"
BEGIN = "<!-- options: written by docs/site/options.py -->"
END = "<!-- end of options -->"

_KINDS = {int: "whole number", float: "number", bool: "switch", str: "text"}


def options_of(name: str) -> str:
    """The options of a command as Markdown: a table for each group."""
    options, arguments = OPTIONS_OF[name], ARGUMENTS_OF[name]
    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = typing.get_type_hints(options)
    order = [*arguments, *(each for each in fields if each not in arguments)]
    lines = ["## Options", ""]
    for group in GROUPS:
        inside = [each for each in order if group_of(name, each) == group]
        inside.sort(key=lambda each: fields[each].default is not dataclasses.MISSING)  # what must be given first
        rows = [_row(fields[each], hints[each], each in arguments) for each in inside]
        if rows and group != EVERY:
            lines += [f"### {group}", "", "| option | takes | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join([*lines, "[All commands share](README.md) a few more."])


def _row(field: dataclasses.Field[Any], hint: Any, argument: bool) -> str:
    types = [each for each in (typing.get_args(hint) or (hint,)) if each is not type(None)]
    several = any(typing.get_origin(each) in (list, tuple) for each in (hint, *types))
    kinds = {_KINDS[one] for each in types for one in (typing.get_args(each) or (each,)) if one in _KINDS}
    option = field.name.upper() if argument else flag_of(field.name)
    if bool in types and field.default is True:
        option = f"{option}, --no-{option[2:]}"
    cells = (
        f"`{option}`", " or ".join(sorted(kinds)) + (", may be repeated" if several else ""), _default(field),
        str(field.metadata["help"]),
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def page_of(name: str, text: str) -> str:
    """The text of a page with the options as they are now."""
    block = f"{BEGIN}\n{options_of(name)}\n{END}"
    before, found, rest = text.partition(BEGIN)
    if not found:
        return f"{text.rstrip()}\n\n{block}\n"
    return before + block + rest.partition(END)[2]


def pages() -> Iterator[tuple[Path, str, str]]:
    """Each page of a command, its text, and what the text should be."""
    for name in OPTIONS_OF:
        path = FOLDER / f"{name}.md"
        text = path.read_text(encoding="utf-8")
        yield path, text, page_of(name, text)


if __name__ == "__main__":
    for path, _, wanted in pages():
        path.write_text(wanted, encoding="utf-8")
