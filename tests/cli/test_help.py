"""`--help`: each option has a group, each command an example that it would take; and a shell completes both."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from kdcache_cli.frame import OPTIONS_OF
from kdcache_cli.help_groups import EXAMPLES, GROUPS
from kdcache_cli.main import app

SHARED = {"config", "json", "log_json", "quiet", "plugin", "help"}


def test_no_group_names_an_option_that_is_gone() -> None:
    there = {name: {field.name for field in dataclasses.fields(options)} for name, options in OPTIONS_OF.items()}
    named = [name for names in GROUPS.values() for name in names.split()]
    assert len(named) == len(set(named))
    for name in named:
        command, _, option = name.rpartition(".")
        assert option in SHARED or any(option in names for of, names in there.items() if command in ("", of)), name


@pytest.mark.parametrize("name", sorted(OPTIONS_OF))
def test_an_example_is_taken(name: str) -> None:
    command, *words = shlex.split(EXAMPLES[name])
    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert (command, words[0]) == ("kdcache", name)
    found.make_context(name, words[1:])  # raises if an option is missing or unknown
    assert set(EXAMPLES) == set(OPTIONS_OF)


def test_the_pages_have_the_options_of_the_command_line() -> None:
    path = Path(__file__).parents[2] / "docs" / "site" / "options.py"
    spec = importlib.util.spec_from_file_location("site_options", path)
    assert spec is not None and spec.loader is not None
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    stale = [page.name for page, text, wanted in options.pages() if text != wanted]
    assert stale == [], f"run python docs/site/options.py: {stale}"
    assert options.page_of("verify", "# A page\n").count("--teacher") == 1


def test_a_shell_completes_commands_and_options() -> None:
    program = Path(sys.executable).with_name("kdcache")
    for words, last, wanted in (("kdcache in", 1, "inspect-shard"), ("kdcache verify --te", 2, "--teacher")):
        told = {"_KDCACHE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(last)}
        done = subprocess.run([program], env={**os.environ, **told}, capture_output=True, text=True, check=False)
        assert done.stdout.split() == [wanted], done.stderr
