"""The commands and the code of README.md and docs: found, made small, and given what their names stand for.

A page is run in a folder of its own, block after block as a reader would. Names that pages use for things that a reader
has (a hub model, a corpus, CACHE) are links to small stand-ins in that folder; `--out` of one command may be the input
of the next. Options that make work long are set to small values. A line that cannot be run here, or that another test
runs, is named below with the reason, and every reason must be of a line that stands in a page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

NOT_HERE = {
    "make ": "it runs the whole of the tests, or builds what CI builds",
    "pip install": "an installation: tests/cli/test_wheel.py installs the wheel",
    "python3 -m venv": "an installation",
    "export KDCACHE_PLUGINS": "a variable of a shell: tests/unit/test_plugins.py",
    "sbatch": "needs SLURM: tests/cluster/test_slurm.py",
    "TASKS=64 bash examples/slurm": "needs SLURM: tests/cluster/test_slurm.py",
    "torchrun --nproc-per-node 4 --no-python": "needs 4 GPUs: tests/distributed/test_tensor_parallel.py has 2 ranks",
    "torchrun --nproc-per-node 8 --no-python": "needs 8 GPUs: tests/distributed/test_tensor_parallel.py has 2 ranks",
    "kdcache dump-teacher --engine vllm": "needs vLLM: tests/cluster/test_vllm.py",
    "kdcache dump-teacher --engine server": "needs a server: tests/teacher/test_server.py has one",
    "kdcache dump-teacher ... --launch ray": "needs Ray: tests/cluster/test_ray.py",
    "kdcache train-student ... --launch ray": "needs Ray: tests/cluster/test_ray.py",
    "kdcache dump-teacher ... --launch local": "starts interpreters: tests/teacher/test_local_launch.py",
    "kdcache convert CACHE --out s3://": "needs a bucket: tests/store/test_remote.py has one",
    "kdcache status s3://": "needs a bucket: tests/faults/test_busy_bucket.py has one",
    "kdcache doctor": "starts interpreters, and takes ten seconds: tests/doctor/test_doctor.py",
    "kdcache demo": "takes minutes: tests/cli/test_demo.py",
    "kdcache distil": "starts interpreters: tests/recipes/test_run.py",
    "kdcache plan": "measures for ten seconds: tests/teacher/test_plan.py",
    "kdcache audit FOLDER --as se-kd": "needs a cache of SE-KD: tests/interop/test_audit.py makes one",
    "kdcache train-student --cache CACHE_OF_ROLLOUTS": "needs rollouts: tests/student/test_rollouts.py",
    "kdcache train-student --cache 8b-cache:1 --pool": "needs another teacher: tests/student/test_multi_teacher.py",
}
"""Lines that are not run, by how they begin, and why not."""

CODE_ELSEWHERE = {
    "docs/engines.md": "tests/examples/test_pages.py",
    "docs/extending.md": "tests/extending/test_page.py",
    "docs/own-loop.md": "tests/examples/test_plain.py",
    "docs/reading.md": "tests/examples/test_reading.py",
    "docs/writing-caches.md": "tests/examples/test_pages.py",
}
"""Pages whose Python is run by a test that also compares what it gives."""

GIVEN = {"README.md": "import torch\nstudent_logits = torch.randn(64, 320)\n"}
"""What the Python of a page takes as given."""

SMALL: dict[str, dict[str, str | None]] = {
    "check-data": {"--seq-len": "64"},
    "dump-teacher": {"--seq-len": "64", "--device": "cpu", "--docs-per-shard": "30", "--batch-rows": "8"},
    "generate": {"--samples": "1", "--max-new-tokens": "4", "--device": "cpu", "--seq-len": None},
    "make-student": {"--layers": "best-1", "--device": "cpu"},
    "train-student": {
        "--steps": "2", "--epochs": None, "--batch-rows": "2", "--device": "cpu", "--heldout": "0.1",
    },
    "evaluate": {"--rows": "2", "--device": "cpu"},
    "verify": {"--rows": "2", "--device": "cpu"},
    "audit": {"--rows": "4", "--device": "cpu"},
    "import": {"--vocab-size": "320"},
    "explore": {"--port": "0", "--device": "cpu"},
    "plot": {"--rows": "4"},
}  # fmt: skip
"""Options of a command as they are here; None takes an option away."""

REST = {
    "dump-teacher": "--teacher TEACHER --corpus CORPUS --out NEW",
    "train-student": "--cache CACHE --student MODEL --out NEW",
}
"""What `...` stands for."""

_FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SHELLS = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page, from the root of the repository.
        line: where it begins.
        language: as it is named.
        text: what stands in it.
    """

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> list[str]:
        """The lines of a shell, continued ones joined, without remarks and prompts."""
        if self.language not in _SHELLS:
            return []
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in joined.splitlines()]
        return [" ".join(line.split()) for line in lines if line]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that are of a shell or of Python."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    found = [Block(name, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in _FENCE.finditer(text)]
    return [block for block in found if block.language in (*_SHELLS, "python")]


def reason_of(command: str) -> str | None:
    """Why a line is not run; None where it is."""
    return next((why for begins, why in NOT_HERE.items() if command.startswith(begins)), None)


def small(command: str) -> list[str]:
    """The words of a `kdcache` line after `kdcache`, as it is run here."""
    plain = re.sub(r"\[[^\]]*\]", "", command)  # what may be left out
    words = [re.sub(r"\|.*", "", word) for word in shlex.split(plain)][1:]  # of alternatives the first
    name = words[0]
    if "..." in words:
        at = words.index("...")
        words[at : at + 1] = _missing(words, REST[name])
    for option, value in SMALL.get(name, {}).items():
        words = _set(words, option, value)
    if "--prompt" in words:  # it measures no rows
        words = _set(words, "--rows", None)
    if name == "explore":
        words = [word for word in words if word != "--no-open"] + ["--no-open"]
    return words


def _missing(words: list[str], rest: str) -> Iterator[str]:
    """The options of the rest that are not among the words."""
    given = shlex.split(rest)
    for option, value in zip(given[::2], given[1::2], strict=True):
        if option not in words:
            yield from (option, value)


def _set(words: list[str], option: str, value: str | None) -> list[str]:
    """The words with another value of an option."""
    if option == "--layers" and option not in words:
        return words
    if option in words:
        at = words.index(option)
        words = words[:at] + words[at + 2 :]
    return words if value is None else [*words, option, value]
