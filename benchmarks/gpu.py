"""All that needs a GPU, for `make gpu`: the tests with the mark `gpu`, then the benchmarks of dump, head and step.

    python -m benchmarks.gpu [--json FILE] [--seconds 480] [--only tests dump head step]

Each part is a process of its own with a time limit, and all of them share `--seconds`. The results go to one JSON
file: for each part its exit status and seconds, and what a benchmark measured. A part that fails or runs out of time is
named there and in the last line, and the exit status is 1. Without a GPU one line says so, and the exit status is 0.

Nothing is installed. Python must have the dependencies of kdcache with a torch that supports the GPU and, for the
tests, pytest; its plugins are not needed. Texts come from KDCACHE_ASSETS, or from the pages of this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = {
    "tests": (240, ["pytest", "-c", "tests/gpu/plain.ini", "--rootdir", ".", "--confcutdir", ".", "-q", "-m", "gpu",
                    "tests/gpu"]),
    "dump": (150, ["benchmarks.dump", "--shape", "1b", "--rows", "32", "--seq-len", "1024", "--batch-rows", "8",
                   "--repeats", "3"]),
    "head": (100, ["benchmarks.head", "--repeats", "5"]),
    "step": (120, ["benchmarks.step", "--shape", "200m", "--rounds", "3", "--limit-docs", "150"]),
}  # fmt: skip
"""Seconds that a part may take, and its module with arguments."""


def missing() -> str:
    """Why nothing can run here, or an empty string."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def corpus(folder: Path) -> Path:
    """A text to dump."""
    real = Path(os.environ.get("KDCACHE_ASSETS", ".")) / "text/wikitext2-valid.txt"
    if real.is_file():
        return real
    made = folder / "documents.txt"
    made.write_text("\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))) * 8)
    return made


def run(limit: float, arguments: list[str]) -> dict[str, Any]:
    """Run one part to its end or its limit; what it says goes to this process's streams."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # kernels run on the card, not in Triton's interpreter
    paths = [str(ROOT), str(ROOT / "cli"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    started = time.monotonic()
    part = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, cwd=ROOT, start_new_session=True)
    try:
        code = part.wait(max(1.0, limit))
        status = "passed" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"not finished after {limit:.0f} s"
    finally:
        if part.poll() is None:  # it and what it started
            os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="benchmarks/results/gpu.json", help="where the results go")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if why := missing():
        print(f"no GPU: {why}; nothing was run")
        return 0
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in options.only:
            limit, arguments = PARTS[name]
            made = folder / f"{name}.json"
            if name != "tests":
                arguments = [*arguments, "--device", "cuda", "--json", str(made)]
            if name in ("dump", "step"):
                arguments = [*arguments, "--corpus", str(corpus(folder))]
            print(f"== {name}", flush=True)
            results[name] = run(min(limit, deadline - time.monotonic()), arguments)
            if made.exists():
                results[name] |= json.loads(made.read_text())
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    failed = [f"{name} ({result['status']})" for name, result in results.items() if result["status"] != "passed"]
    print(f"results in {path}; " + (f"failed: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
