"""Every command and all Python of README.md and docs runs, or `snippets.py` says why it is not run here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache.explorer.server import ExplorerServer
from kdcache.interop.export import export
from kdcache.teacher.dump import dump
from tests.examples import snippets
from tests.examples.snippets import CODE_ELSEWHERE, GIVEN, NOT_HERE, PAGES, ROOT, blocks_of, reason_of, small
from tests.making import STUDENT, TEXTS, dump_options
from tests.processes import kdcache, python

OUTPUTS = ("--out", "--html")


class Place:
    """A folder in which the names of pages stand for something.

    Args:
        folder: of the page.
        world: of what pages share.
        teacher, corpus: fixtures.
    """

    def __init__(self, folder: Path, world: Path, teacher: Path, corpus: Path) -> None:
        self.folder, self._world, self._teacher, self._corpus = folder, world, teacher, corpus
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / "my_module.py").write_text("")

    def ready(self, words: list[str]) -> None:
        """Make what words name and is not there, and clear what is to be written."""
        outputs = {words[i + 1] for i, word in enumerate(words[:-1]) if word in OUTPUTS}
        for name in outputs:
            path = self.folder / name
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        for word in words:
            name = word.rpartition(":")[0] if word.rpartition(":")[2].isdecimal() else word
            path = self.folder / name
            if name in outputs or name not in MADE:
                continue
            if path.is_symlink():  # it may stand for something else in this line
                path.unlink()
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(getattr(self, MADE[name])(words))

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self._world / name
        if not path.exists():
            make(path)
        return path

    def model(self, _: list[str]) -> Path:
        return self._teacher

    def config(self, _: list[str]) -> Path:
        text = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **STUDENT})
        return self._once("config.json", lambda path: path.write_text(text))

    def text(self, _: list[str]) -> Path:
        return self._once("texts.txt", lambda path: path.write_text("\n\n".join(TEXTS)))

    def records(self, _: list[str]) -> Path:
        return self._corpus

    def grown(self, _: list[str]) -> Path:
        more = self._corpus.read_text() + json.dumps({"text": "One more, about a heron."}) + "\n"
        return self._once("grown.jsonl", lambda path: path.write_text(more))

    def questions(self, _: list[str]) -> Path:
        lines = "".join(json.dumps({"prompt": f"Why {n}?"}) + "\n" for n in range(3))
        return self._once("questions.jsonl", lambda path: path.write_text(lines))

    def cache(self, _: list[str]) -> Path:
        return self._once("cache", lambda path: dump(dump_options(self._teacher, self._corpus, path, k=32)))

    def dumped(self, _: list[str]) -> Path:
        """A cache as the command makes it here, for `--reuse`."""

        def make(path: Path) -> None:
            line = f"kdcache dump-teacher --teacher {self._teacher} --corpus {self._corpus} --out {path}"
            done = kdcache(*small(line))
            assert done.returncode == 0, done.stderr

        return self._once("dumped", make)

    def foreign(self, words: list[str]) -> Path:
        """A folder of another tool, of the format that the line names."""
        form = words[words.index("--as") + 1] if "--as" in words else "distillkit"
        return self._once(form, lambda path: export(self.cache(words), path, form))

    def answers(self, words: list[str]) -> Path:
        return self._once("answers.jsonl", lambda path: export(self.cache(words), path, "topk-jsonl"))

    def samples(self, _: list[str]) -> Path:
        """The tokens of Megatron's samples, as records."""
        rows = parquet.read_table(self.foreign(["--as", "megatron"]) / "tokens.parquet").to_pylist()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        return self._once("samples.jsonl", lambda path: path.write_text(lines))

    def run(self, words: list[str]) -> Path:
        """A folder of a training."""

        def make(path: Path) -> None:
            line = f"kdcache train-student --cache {self.cache(words)} --student {self.config(words)} --out {path}"
            done = kdcache(*small(line))
            assert done.returncode == 0, done.stderr

        return self._once("run", make)

    def evaluation(self, words: list[str]) -> Path:
        def make(path: Path) -> None:
            line = f"kdcache evaluate --cache {self.cache(words)} --student {self._teacher} --out {path}"
            done = kdcache(*small(line))
            assert done.returncode == 0, done.stderr

        return self._once("evaluation.json", make)

    def module(self, _: list[str]) -> Path:
        return self._once("my_module.py", lambda path: path.write_text(""))


MADE = {
    **dict.fromkeys(("Qwen/Qwen2.5-0.5B", "DIR_OR_HUB_NAME", "TEACHER", "T", "my-teacher"), "model"),
    **dict.fromkeys(("MODEL", "my-student", "DIR", "A", "B", "S"), "model"),
    **dict.fromkeys(("CACHE", "8b-cache", "70b-cache", "other-cache", "my-cache"), "cache"),
    **dict.fromkeys(("CORPUS", "my-chats.jsonl"), "records"),
    "C": "model",
    "my-texts.txt": "text",
    "grown.jsonl": "grown",
    "OLD": "dumped",
    "questions.jsonl": "questions",
    "FOLDER": "foreign",
    "LOGITS": "foreign",
    "answers.jsonl": "answers",
    "ANSWERS.jsonl": "answers",
    "samples.jsonl": "samples",
    "RUN": "run",
    "RUN2": "run",
    "evaluation.json": "evaluation",
    "path/to/mine.py": "module",
}
"""What each name that pages use is here: a method of `Place`."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


def explored(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explore` without the part that waits for a browser."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: server.page())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(
    page: Path, world: Path, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, world, teacher, corpus)
    code = ""
    for block in blocks_of(page):
        for command in block.commands():
            if reason_of(command):
                continue
            where = f"{block.page}, line {block.line}: {command}"
            assert command.startswith("kdcache "), f"{where}: not a command of kdcache, and no reason in snippets.py"
            words = small(command)
            if block.page == "docs/contexts.md":
                words = ["CORPUS" if word == "C" else word for word in words]
            place.ready(words)
            if words[0] == "explore":
                explored(words, tmp_path, monkeypatch)
                continue
            done = kdcache(*words, cwd=tmp_path)
            assert done.returncode in ((0, 1) if words[0] == "audit" else (0,)), f"{where}\n{done.stdout}{done.stderr}"
        if block.language == "python" and block.page not in CODE_ELSEWHERE:
            code += block.text
            place.ready(["my-cache"])
    if code:
        done = python("-c", GIVEN.get(str(page.relative_to(ROOT)), "") + code, cwd=tmp_path)
        assert done.returncode == 0, f"{page}\n{done.stderr}"


def test_every_reason_is_of_something_that_is_there() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    commands = [command for block in blocks for command in block.commands()]
    assert len(commands) > 60
    for begins in NOT_HERE:
        assert any(command.startswith(begins) for command in commands), begins
    for page, test in CODE_ELSEWHERE.items():
        assert any(block.page == page and block.language == "python" for block in blocks), page
        assert page.removeprefix("docs/") in (ROOT / test).read_text(), test


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snippets, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```sh\nkdcache dump-teacher --k 3 [--seed 1] \\\n  ...   # a remark\n```\n```toml\na = 1\n```\n")
    (block,) = blocks_of(page)
    (command,) = block.commands()
    assert command == "kdcache dump-teacher --k 3 [--seed 1] ..." and reason_of(command) is None
    words = " ".join(small(command))
    assert words.startswith("dump-teacher --k 3 --teacher TEACHER --corpus CORPUS --out NEW --seq-len 64")
