"""Plug-ins: what a person names is imported, what it registers is found, and what is wrong is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.errors import ConfigError
from kdcache.plugins import VARIABLE, load_plugins
from kdcache.registry import Registry
from tests.processes import fresh_kdcache as kdcache


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", list(sys.path))


def plugin(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_a_registry_finds_what_was_registered_and_names_what_there_is() -> None:
    found: Registry[int] = Registry("number")
    found.register("one", 1)
    assert found.find("one") == 1 and found.names() == ("one",) and "two" not in found
    with pytest.raises(ConfigError, match="number two is not one of one"):
        found.find("two")
    with pytest.raises(ConfigError, match="a number named one is registered already"):
        found.register("one", 2)
    for name in ("", "a:b", "a b", "é"):
        with pytest.raises(ConfigError, match="cannot be registered as"):
            found.register(name, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' (line 1 of"),
        ("1 +", "SyntaxError"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero (line 1 of"),
        (
            "from kdcache.losses import register_divergence\nregister_divergence('tvd', None)",
            "was refused: a loss named tvd is registered already",
        ),
    ],
)
def test_a_plug_in_that_fails_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    name = f"bad_plugin_{abs(hash(text))}"
    done = kdcache("verify", tmp_path, "--plugin", plugin(tmp_path, name, text))
    assert done.returncode == 2 and done.stdout == ""
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_plug_in_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the plug-in .*gone\.py does not exist"):
        load_plugins([str(tmp_path / "gone.py")])
    with pytest.raises(ConfigError, match="the plug-in gone_module cannot be imported: ModuleNotFoundError"):
        load_plugins(["gone_module"])
    with pytest.raises(ConfigError, match="another module is named 'json'"):
        load_plugins([str(plugin(tmp_path, "json", ""))])


def test_the_variable_may_name_a_file_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "from_here", "from kdcache.losses import register_divergence\nregister_divergence('here', max)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "./from_here.py")
    load_plugins(())
    assert os.environ[VARIABLE] == str(tmp_path / "from_here.py") and "from_here" in sys.modules


@pytest.mark.slow
def test_worker_processes_find_what_their_parent_loaded(tmp_path: Path) -> None:
    plugin(tmp_path, "my_divergence", "from kdcache.losses import register_divergence\nregister_divergence('m', max)")
    code = "from kdcache.losses.divergence_registry import find_divergence; print(find_divergence('m').function is max)"
    main = f"""
import os, subprocess, sys
from kdcache.plugins import load_plugins
load_plugins(["my_divergence", "my_divergence"])
print(subprocess.run([sys.executable, "-c", {code!r}], capture_output=True, text=True, check=True).stdout.strip())
"""
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-c", main], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
