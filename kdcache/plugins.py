"""Plug-ins: code of the person who runs a command, imported because that person named it.

A plug-in is a module that registers divergences, kinds, engines or stores when it is imported. It is named by
`--plugin MODULE` or by the environment variable `KDCACHE_PLUGINS` (a comma-separated list), as a dotted name or as the
path of a `.py` file. Nothing in a cache, a model's folder or a corpus ever names one.

What is loaded is added to `KDCACHE_PLUGINS`, so that the worker processes of a run find it too.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from kdcache.errors import ConfigError, KdcacheError

VARIABLE = "KDCACHE_PLUGINS"


def load_plugins(names: Iterable[str]) -> None:
    """Import plug-ins, those of the environment first; one that is imported already does nothing.

    Args:
        names: dotted names (the working folder is searched last) or paths of `.py` files.

    Raises:
        ConfigError: one cannot be imported, or what it registers is refused.
    """
    wanted: list[str] = []
    for name in (*(name for name in os.environ.get(VARIABLE, "").split(",") if name), *names):
        full = str(Path(name).expanduser().resolve()) if _is_file(name) else name
        if "," in full:
            raise ConfigError(f"the plug-in {full} has a comma in its name; rename it")
        if full not in wanted:
            wanted.append(full)
    for name in wanted:
        _load(name)
    if wanted:
        os.environ[VARIABLE] = ",".join(wanted)


def load_inherited() -> None:
    """Import the plug-ins that the process which started this one has loaded; see `load_plugins`."""
    if os.environ.get(VARIABLE):
        load_plugins(())


def _is_file(name: str) -> bool:
    return name.endswith(".py") or os.sep in name


def _load(name: str) -> None:
    module, folder = (Path(name).stem, str(Path(name).parent)) if _is_file(name) else (name, os.getcwd())  # noqa: PTH109
    if _is_file(name):
        if not Path(name).is_file():
            raise ConfigError(f"the plug-in {name} does not exist")
        if not module.isidentifier():
            raise ConfigError(f"the plug-in {name} cannot be imported: {module!r} is not a name of Python's")
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing; worker processes are given the same path
    try:
        if _is_file(name):
            spec = find_spec(module)
            if spec is None or spec.origin is None or Path(spec.origin).resolve() != Path(name):
                raise ConfigError(f"another module is named {module!r}; rename the file")
        importlib.import_module(module)
    except KdcacheError as error:
        raise ConfigError(f"the plug-in {name} was refused: {error}") from None
    except Exception as error:
        raise ConfigError(f"the plug-in {name} cannot be imported: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What went wrong, in one line, and where in the plug-in's own file."""
    lines = str(error).strip().splitlines() or [""]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    where = f" (line {frames[-1].lineno} of {frames[-1].filename})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {lines[0]}{where}"
