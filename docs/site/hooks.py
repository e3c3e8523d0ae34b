"""What `make docs` does beside mkdocs: README.md becomes the home page and CHANGELOG.md a page, files of the repository
that a page links to come along, and formulas in `math` blocks become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

_LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?\)")
_PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie outside docs."""

_REPOSITORY = "repository"
"""Folder of the site for files that lie outside docs."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw `math` blocks."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _mathml})
    return config


def _mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, and whatever pages link to outside docs."""
    pages = {page: (ROOT / path).read_text(encoding="utf-8") for page, path in _PAGES.items()}
    files_of_pages = [File.generated(config, page, content=text) for page, text in pages.items()]
    for file in files.documentation_pages():
        pages[file.src_uri] = file.content_string
    wanted = {path for page, text in pages.items() for path in _outside(page, text) if (ROOT / path).is_file()}
    for path in sorted(wanted - set(_PAGES.values())):
        files.append(File.generated(config, f"{_REPOSITORY}/{path}", abs_src_path=str(ROOT / path)))
    for file in files_of_pages:
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to where their files are in the site."""

    def moved(found: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, found[2])
        target = path.removeprefix("docs/") if path.startswith("docs/") else f"{_REPOSITORY}/{path}"
        target = next((page for page, outside in _PAGES.items() if outside == path), target)
        if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
            target += "/README.md"
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{found[1]}{posixpath.relpath(target, start)}{found[3] or ''})"

    return _LINK.sub(moved, markdown)


def _in_repository(page: str, link: str) -> str:
    """The path in the repository that a link of a page of the site leads to."""
    folder = "" if page in _PAGES else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def _outside(page: str, text: str) -> set[str]:
    paths = {_in_repository(page, found[2]) for found in _LINK.finditer(text)}
    return {path for path in paths if not path.startswith(("docs/", ".."))}
