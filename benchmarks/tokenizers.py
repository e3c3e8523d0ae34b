"""Students with another tokenizer: held-out bits per byte under each loss, in the same steps over the same rows.

    python -m benchmarks.tokenizers --teacher DIR --corpus FILE --student-tokenizer DIR|FILE.gguf --work DIR
        [--chars 200000] [--steps 150] [--seeds 3] [--csv FILE]

One teacher, one cache, `topk` with 32 entries, over the last `--chars` characters of a text file. Each student has the
same size and the same rows in the same order; a seed decides that order and the initial weights. Results that exist
already are not computed again. `--train-teacher STEPS` first makes a teacher: it trains one of the tokenizer of
`--teacher` from labels, on the characters before those; the text of the cache is new to it.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache import open_cache
from kdcache.alignment import AlignedRows, Alignment, read_student_tokenizer
from kdcache.losses import Objective
from kdcache.pretrained import load_tokenizer
from kdcache.student.config import TrainConfig
from kdcache.student.data import batches
from kdcache.student.fused_head import compute_loss, fuse_head
from kdcache.student.model import load_student
from kdcache.student.train import train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump

SIZES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
TEACHER = {**SIZES, "hidden_size": 96, "intermediate_size": 288}
HELDOUT = 0.15
WAYS = {
    "labels": ("forward-kl", 0.0),
    "in common": ("forward-kl", 0.5),
    "uld": ("uld", 0.5),
    "gold": ("gold", 0.5),
    "alm": ("alm", 1.0),
    "alm and labels": ("alm", 0.5),
}
"""Loss and soft weight of each student."""
FIGURES = ("bits_per_byte", "teacher_bits_per_byte", "aligned_bytes", "tokens_per_chunk")


def write_model(folder: Path, tokenizer: Any, sizes: dict[str, Any]) -> Path:
    """A config.json of a model, and its tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": len(tokenizer), **sizes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder / "config.json"


def settings(out: Path, cache: Path, student: Path | str, steps: int, seed: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        cache=str(cache), student=str(student), out=str(out), steps=steps, batch_rows=4, lr=4e-3, heldout=HELDOUT,
        seed=seed, device="cpu", resume=out.exists(), **more,
    )  # fmt: skip


def make_cache(teacher: str, text: str, out: Path, **more: Any) -> Path:
    """A cache of a text, one document a paragraph."""
    corpus = out.with_suffix(".jsonl")
    documents = [part.strip() for part in text.split("\n\n") if part.strip()]
    corpus.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    dump(DumpConfig(teacher=teacher, corpus=str(corpus), out=str(out), seq_len=256, device="cpu", k=32, **more))
    return out


def train_teacher(tokenizer: Path, text: str, work: Path, steps: int) -> str:
    """A teacher of a tokenizer, from labels alone."""
    start, out = work / "teacher-start", work / "teacher"
    if not (out / "summary.json").exists():
        config = write_model(start, load_tokenizer(tokenizer), TEACHER)
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start)).save_pretrained(start)
        cache = make_cache(str(start), text, work / "teacher-cache")  # its labels; the targets are not used
        train(settings(out, cache, config, steps, 0, soft_weight=0.0))
    return str(out)


def run(way: str, seed: int, work: Path, steps: int) -> dict[str, float]:
    """The held-out figures of one student."""
    loss, soft_weight = WAYS[way]
    out = work / f"{way.replace(' ', '-')}-{seed}"
    found = out.with_suffix(".json")
    if found.exists():
        return dict(json.loads(found.read_text()))
    config = settings(
        out, work / "cache", work / "student" / "config.json", steps, seed, align=True, loss=loss,
        soft_weight=soft_weight,
    )  # fmt: skip
    summary = train(config)
    after, before = summary["heldout"]["after"], summary["heldout"]["before"]
    figures = {name: after[name] for name in FIGURES}
    figures |= {"before": before["bits_per_byte"], "seconds_per_step": summary["training_seconds"] / steps}
    found.write_text(json.dumps(figures))
    return figures


def costs(work: Path) -> dict[str, float]:
    """Processor time of reading a row, plainly and aligned, and of a training step of each loss over that of labels."""
    cache, folder = open_cache(work / "cache"), work / "student"
    alignment = Alignment(cache, read_student_tokenizer("student", folder))
    rows = AlignedRows(cache, alignment)
    numbers = list(range(min(32, len(cache))))
    found = {
        f"milliseconds a row, {name}": 1000 * least(lambda each=each: list(each.read_rows(numbers))) / len(numbers)
        for name, each in {"plain": cache, "aligned": rows}.items()
    }
    model = load_student(str(folder / "config.json"), cache, torch.device("cpu"), 0, alignment=alignment)
    head, (batch,) = fuse_head(model, "cpu"), batches(rows, range(4), 4)

    def step(objective: Objective) -> None:
        compute_loss(model, head, batch, objective, vocab_size=rows.row_spec.vocab_size).backward()
        model.zero_grad()

    base = 0.0
    for way, (loss, soft_weight) in WAYS.items():
        objective = Objective(loss=loss, soft_weight=soft_weight)
        took = least(lambda objective=objective: step(objective))
        base = base or took
        found[f"step, {way}"] = took / base
    return found


def least(call: Callable[[], Any], times: int = 5) -> float:
    """The least processor time of some calls, seconds."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        call()
        taken.append(time.process_time() - begun)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--student-tokenizer", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--chars", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-teacher", type=int, default=0)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, text = Path(args.work), Path(args.corpus).read_text()
    work.mkdir(parents=True, exist_ok=True)
    write_model(work / "student", load_tokenizer(Path(args.student_tokenizer)), SIZES)
    if not (work / "cache").exists():
        teacher, rest = args.teacher, text[: -args.chars]
        if args.train_teacher:
            teacher = train_teacher(Path(args.teacher), rest, work, args.train_teacher)
        make_cache(teacher, text[-args.chars :], work / "cache")
    rows = []
    for way in WAYS:
        each = [run(way, seed, work, args.steps) for seed in range(args.seeds)]
        bits = [one["bits_per_byte"] for one in each]
        spread = statistics.stdev(bits) if len(bits) > 1 else 0.0
        means = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
        rows.append({"way": way, "seeds": len(each), "steps": args.steps, "bits_per_byte": means["bits_per_byte"],
                     "spread": spread, **{k: v for k, v in means.items() if k != "bits_per_byte"}})  # fmt: skip
        print({name: value if isinstance(value, str | int) else round(value, 4) for name, value in rows[-1].items()})
    for name, value in costs(work).items():
        print(f"{name}: {value:.3g}", flush=True)
    if args.csv:
        with Path(args.csv).open("w", newline="") as file:
            file.write(f"# {time.strftime('%Y-%m-%d')}, {platform.machine()}, 1 thread\n")
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
