"""The wheel holds two top-level modules and nothing else; the sdist holds what its own Makefile needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(kind: str, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


@pytest.mark.slow
def test_what_the_wheel_holds(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(build("wheel", tmp_path)).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kdcache", "kdcache_cli"}
    assert any(name.endswith("entry_points.txt") for name in names)
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "kdcache").rglob("*.py")}
    assert ours <= names and "kdcache/testing/store_conformance.py" in names


@pytest.mark.slow
def test_what_the_sdist_holds(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "tests/bounds.py", "benchmarks/gpu.py")
    assert {"pyproject.toml", "kdcache/__init__.py", "cli/kdcache_cli/main.py", *wanted} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", ".git/"))]
