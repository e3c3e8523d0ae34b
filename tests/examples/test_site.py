"""The documentation builds as a site, strictly: pages and formulas are in it, and nothing is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.loading import EXAMPLES

ROOT = EXAMPLES.parent


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "Run the teacher once." in home and 'href="selection/"' in home
    assert (tmp_path / "mathematics" / "index.html").read_text().count("<math") >= 8
    assert (tmp_path / "repository" / "examples" / "trl_sft.py").read_bytes() == (
        ROOT / "examples/trl_sft.py"
    ).read_bytes()
    for page in tmp_path.rglob("*.html"):
        assert not re.search(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//', page.read_text()
        )
