"""Imports point only downward, lazily where it matters, and public names are what they say."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kdcache
import kdcache.student

ROOT = Path(kdcache.__file__).parent
LAYERS = [
    {"prefixes"},
    {"errors", "rows", "compiled", "entry_form", "lazy_torch", "prepared_mask", "stopping"},
    {"options", "plugins", "known", "advice", "drawing", "surfaces"},
    {"registry", "file_systems", "launcher", "ray_cluster"},
    {"extras", "targets", "token_bytes", "worker"},
    {"aligned_targets"},
    {"crew"},
    {"position_filter", "selection", "losses", "codec", "isolation"},
    {"corpus"},
    {"store"},
    {"file_hashes", "generated_corpus", "given_rows"},
    {"pretrained", "row_views"},
    {"cache", "cache_writer", "verify"},
    {"alignment", "convert", "interop"},
    {"teacher", "student", "generation"},
    {"report", "planning"},
    {"plots"},
    {"demo", "explorer"},
    {"recipes", "doctor"},
    {"testing"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kdcache."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("kdcache."))
    return found


def test_every_module_has_a_layer() -> None:
    assert {name for _, name, _ in pkgutil.iter_modules([str(ROOT)])} == set(LEVEL)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).with_suffix("").parts[0]
    if room == "__init__" or path == ROOT / "store" / "testing.py":  # an alias
        return
    for module in imports(path):
        target = module.split(".")[1]
        assert target == room or LEVEL[target] < LEVEL[room], f"{path.name} imports {module}"


def test_no_circles_inside_a_room() -> None:
    edges = {}
    for path in ROOT.rglob("*.py"):
        if path.name != "__init__.py":
            edges["kdcache." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = imports(path)

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join((*trail, node))
        for target in edges.get(node, ()):
            visit(target, (*trail, node))

    for module in edges:
        visit(module, ())


def test_the_command_line_is_on_top() -> None:
    assert not [p for p in ROOT.rglob("*.py") if "kdcache_cli" in p.read_text()]
    assert not (ROOT.parent / "cli" / "__init__.py").exists()


def test_only_the_command_line_prints() -> None:
    for path in ROOT.rglob("*.py"):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        assert not [c for c in calls if getattr(c.func, "id", "") == "print"], path


@pytest.mark.parametrize("package", [kdcache, kdcache.student], ids=lambda p: p.__name__)
def test_public_names(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_the_exception_tree_in_the_docstring_is_the_tree() -> None:
    errors = importlib.import_module("kdcache.errors")
    drawn = [line.strip("│├└─ ").split()[0] for line in errors.__doc__.splitlines() if "Error " in line][:-1]
    classes = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.KdcacheError)}
    assert set(drawn) == classes


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_student_lives_without_the_teacher() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "kdcache.teacher" or name.startswith("kdcache.teacher."):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import importlib, pkgutil, kdcache.student
for module in pkgutil.iter_modules(kdcache.student.__path__):
    importlib.import_module("kdcache.student." + module.name)
import kdcache.cache
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from kdcache_cli.main import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert CliRunner().invoke(app, ["train-student", "--help"]).exit_code == 0
heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_summary_of_a_cache_imports_nothing_heavy() -> None:
    cache = Path(__file__).parents[1] / "golden" / "ipps-adaptive-6-arrow"
    code = f"""
import sys
from typer.testing import CliRunner
from kdcache_cli.main import app
done = CliRunner().invoke(app, ["inspect-shard", {str(cache)!r}])
assert done.exit_code == 0 and "ipps" in done.output, done.output
heavy = {{"torch", "transformers", "datasets", "numba", "zarr", "fsspec"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_page_lists_the_layers_from_the_highest_down() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = text[text.index("## Parts") : text.index("## Where is")]
    names = [name.removesuffix(".py") for name in re.findall(r"`kdcache/(\w+(?:\.py|(?=/)))", parts)]
    assert sorted(names) == sorted(LEVEL)
    assert [LEVEL[name] for name in names] == sorted((LEVEL[name] for name in names), reverse=True)


@pytest.mark.parametrize("package", sorted(path.parent for path in ROOT.rglob("__init__.py")), ids=lambda p: p.name)
def test_a_package_names_each_of_its_modules(package: Path) -> None:
    index = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    if package != ROOT:  # whose parts are listed by docs/architecture.md
        assert {name for name in modules if not re.search(rf"\b{name}\.py\b", index)} == set()


def test_kinds_are_named_in_few_places() -> None:
    """A kind is compared by its name in the registry, the command line and the schema; code elsewhere has its class."""
    name = re.compile(r'"(topk|topp|sample|ipps|full)"')
    files = [path for folder in (ROOT, ROOT.parent / "cli") for path in folder.rglob("*.py")]
    lines = [f"{path}: {line}" for path in files for line in path.read_text().splitlines() if name.search(line)]
    assert 5 < len(lines) <= 25, "\n".join(lines)
