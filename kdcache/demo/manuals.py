"""Manuals: English that every CPython carries, its language reference and its docstrings.

Nothing is imported to get at the docstrings: the standard library's source is parsed.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from pathlib import Path

_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LEAST_CHARS = 80


def manuals() -> list[str]:
    """Documents, each once, in an order that depends on nothing but the Python version."""
    from pydoc_data.topics import topics

    found = [text.strip() for _, text in sorted(topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _SKIP.intersection(path.relative_to(root).parts):
            found += _docstrings(path)
    return [text for text in dict.fromkeys(found) if len(text) >= _LEAST_CHARS]


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file that is broken on purpose
        return []
    holders = (
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    texts = (ast.get_docstring(node, clean=False) for node in holders)
    return [inspect.cleandoc(text).strip() for text in texts if text]
