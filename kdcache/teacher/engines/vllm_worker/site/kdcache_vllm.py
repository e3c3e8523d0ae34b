"""The worker's door into vLLM's environment. This folder, and nothing else of kdcache's environment, is on its path.

`python -m kdcache_vllm` serves an engine. The entry point beside this file has vLLM call `register` in every process
that it starts (one for each part of a tensor-parallel teacher).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[4]


def find_kdcache() -> None:
    """Make `kdcache` importable without the packages beside it, which are of another environment."""
    if "kdcache" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "kdcache", _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kdcache"] = module
    spec.loader.exec_module(module)


def register() -> None:
    """Have vLLM make the teacher's model with a pooler that selects."""
    find_kdcache()
    from kdcache.teacher.engines.vllm_worker.model import register

    register()


if __name__ == "__main__":
    find_kdcache()
    from kdcache.teacher.engines.vllm_worker.serve import main

    main()
