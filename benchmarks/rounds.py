"""On-policy rounds against the same number of steps without them, on a small real teacher.

    python -m benchmarks.rounds [--teacher DIR] [--text FILE] [--rounds 2] [--steps 150] [--seeds 0 1 2] [--json FILE]

A student of two of the teacher's layers learns from the teacher's targets on the text (`start`). Then, round after
round, it writes behind the first words of paragraphs, the teacher scores what it wrote, and it learns
`--loss` from that. `same text` takes as many steps more on the text that `start` learned from, with the same loss.

Each student is measured where it goes itself: it writes behind the first words of other paragraphs, with the same
seed, and KL(teacher ‖ student) is taken on what it wrote, over the whole vocabulary (`dense_kl`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write
from kdcache.generation.generate import generate
from kdcache.generation.options import GenerateOptions
from kdcache.report.evaluate import evaluate
from kdcache.student.config import TrainConfig
from kdcache.student.from_teacher.config import MakeStudentOptions
from kdcache.student.from_teacher.make import make_student
from kdcache.student.train import train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump

PROMPT_WORDS, NEW_TOKENS, SEQ_LEN, ROWS = 12, 96, 256, 8
FIGURES = ("kl", "nll", "top1_agreement")


class Experiment:
    """A teacher, a text, and a folder for everything that is made."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._teacher, self._folder, self._options = options.teacher, folder, options
        paragraphs = [p for p in Path(options.text).read_text().split("\n\n") if len(p.split()) > 2 * PROMPT_WORDS]
        prompts = [" ".join(p.split()[:PROMPT_WORDS]) for p in paragraphs]
        self._prompts = self._lines("prompts.txt", prompts[: options.prompts])
        self._others = self._lines("others.txt", prompts[-options.prompts :])
        self._corpus = self._lines("text.txt", paragraphs[: options.documents])

    def _lines(self, name: str, lines: list[str]) -> str:
        path = self._folder / name
        path.write_text("\n".join(" ".join(line.split()) for line in lines) + "\n")
        return str(path)

    def score(self, corpus: str, name: str) -> str:
        """A cache of the teacher's targets on a corpus."""
        out = str(self._folder / f"{name}-targets")
        dump(
            DumpConfig(
                teacher=self._teacher, corpus=corpus, out=out, seq_len=SEQ_LEN, k=64, split_text="line", device="cpu"
            )
        )
        return out

    def write(self, writer: str, prompts: str, name: str, seed: int) -> str:
        """What a student writes, scored by the teacher."""
        out = str(self._folder / f"{name}-text")
        generate(
            GenerateOptions(
                writer=writer, prompts=prompts, out=out, split_text="line", max_new_tokens=NEW_TOKENS, seed=seed,
                batch_rows=64, device="cpu",
            )
        )  # fmt: skip
        return self.score(out, name)

    def learn(self, student: str, cache: str, name: str, seed: int, steps: int, loss: str) -> str:
        """A student that has learned from a cache."""
        out = str(self._folder / name)
        train(
            TrainConfig(
                cache=(cache,), student=student, out=out, steps=steps, batch_rows=ROWS, lr=self._options.lr, loss=loss,
                seed=seed, heldout=0.02, device="cpu",
            )
        )  # fmt: skip
        return out

    def measure(self, student: str, name: str) -> dict[str, float]:
        """Figures of a student on text of its own, behind words that it has not been trained behind."""
        cache = self.write(student, self._others, f"{name}-own", seed=1 << 20)
        found = evaluate(student, cache, self._teacher, device="cpu")
        return {figure: found[figure] for figure in (*FIGURES, "dense_kl")}

    def run(self, seed: int) -> dict[str, dict[str, float]]:
        """All students of a seed, and what was found of each."""
        options, name = self._options, f"seed-{seed}"
        text = self.score(self._corpus, f"{name}-start")
        cut = str(self._folder / f"{name}-cut")
        make_student(
            MakeStudentOptions(teacher=self._teacher, layers=options.layers, cache=text, out=cut, device="cpu")
        )
        student = start = self.learn(cut, text, f"{name}-first", seed, options.first_steps, "forward-kl")
        found = {"start": self.measure(start, f"{name}-first")}
        for number in range(1, options.rounds + 1):
            here = f"{name}-round-{number}"
            rollouts = self.write(student, self._prompts, here, seed=1000 * seed + number)
            student = self.learn(student, rollouts, f"{here}-student", seed, options.steps, options.loss)
            found[f"round {number}"] = self.measure(student, here)
        same = self.learn(start, text, f"{name}-same", seed + 1, options.rounds * options.steps, options.loss)
        return {**found, "same text": self.measure(same, f"{name}-same")}


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(assets / "models/stories260K"))
    parser.add_argument("--text", default=str(assets / "text/tinystories.txt"))
    parser.add_argument("--layers", default="0,4")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--first-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loss", default="forward-kl", help="of the rounds, and of as many steps without them")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"{'seed':>4} {'student':24}" + "".join(f"{figure:>16}" for figure in (*FIGURES, "dense_kl")))
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found = Experiment(options, Path(folder)).run(seed)
        results.append({"seed": seed, "students": found})
        for name, figures in found.items():
            print(f"{seed:4} {name:24}" + "".join(f"{figures[f]:16.4f}" for f in (*FIGURES, "dense_kl")), flush=True)
    for name in results[0]["students"]:
        values = [one["students"][name]["dense_kl"] for one in results]
        print(f"mean {name:24}{statistics.fmean(values):64.4f}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    settings |= {name: Path(settings[name]).name for name in ("teacher", "text")}
    write(options.json, "cpu", settings, results)


if __name__ == "__main__":
    main()
