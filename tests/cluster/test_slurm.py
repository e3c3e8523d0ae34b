"""The examples under a real SLURM: what tasks that are cancelled, requeued, preempted and drained leave is complete.

Every cache is that of one process, byte for byte, and every student that of a run that was left alone, bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcache import verify_cache
from tests.cluster.slurm import Slurm, cluster, missing, until
from tests.making import STUDENT, TEXTS, make_model, make_tokenizer
from tests.processes import Ranks, kdcache

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
DUMP = ("--docs-per-shard", "100", "--batch-rows", "1")
STEPS = 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing()), reason=f"SLURM is not installed ({', '.join(missing())}): tests/cluster/install_slurm.sh"
    ),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as running:
        yield running


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of 1,024 positions, a corpus of 18 shards, and the cache that one process makes."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "teacher").mkdir()
    make_tokenizer(folder / "teacher")
    make_model(folder / "teacher", max_position_embeddings=1024, hidden_size=128, intermediate_size=512)
    student = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **STUDENT, "max_position_embeddings": 1024}
    (folder / "student.json").write_text(json.dumps(student))
    texts = [{"text": f"{n}: {text}"} for n in range(16) for text in TEXTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    done = kdcache(
        "dump-teacher", "--teacher", folder / "teacher", "--corpus", folder / "corpus.jsonl", "--out", folder / "whole",
        "--seq-len", "1024", "--k", "64", "--temperatures", "1,2", "--precision", "6", *DUMP, env=one_thread(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert commits(folder / "whole") == 18
    return folder


def commits(cache: Path) -> int:
    return len(list((cache / "commits").glob("*.json")))


class Trial:
    """One cache, one student and the words of their jobs, in a folder of their own."""

    def __init__(self, slurm: Slurm, work: Path, folder: Path) -> None:
        self.slurm, self.work, self.folder = slurm, work, folder
        self.cache, self.out = folder / "cache", folder / "student"
        self.names = {
            "TEACHER": work / "teacher", "CORPUS": work / "corpus.jsonl", "CACHE": self.cache,
            "STUDENT": work / "student.json", "OUT": self.out, "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip

    def submit(self, *words: object) -> str:
        """Submit with `sbatch`; what jobs say is in this folder."""
        return self.slurm.submit("--chdir", self.folder, "--cpus-per-task=2", *words, **self.names)

    def words(self) -> str:
        return "".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.out")))

    def wait(self) -> None:
        self.slurm.wait()

    def until_committed(self, count: int) -> None:
        until(lambda: commits(self.cache) >= count, lambda: f"fewer than {count} shards: {self.words()}")

    def require_the_cache_of_one(self) -> None:
        """Every file is the same, to the byte."""
        command = ["diff", "-r", self.work / "whole", self.cache]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + self.words()
        assert verify_cache(self.cache).ok


@pytest.fixture
def trial(slurm: Slurm, work: Path, tmp_path: Path) -> Trial:
    return Trial(slurm, work, tmp_path)


def training(work: Path, out: Path, *more: object) -> list[object]:
    """What train.sbatch runs, on the cache of one process."""
    return [
        "train-student", "--cache", work / "whole", "--student", work / "student.json", "--out", out,
        "--temperature", "2", "--soft-weight", "0.9", *more,
    ]  # fmt: skip


def options(batch_rows: int) -> list[str]:
    return f"--steps {STEPS} --batch-rows {batch_rows} --lr 5e-3 --heldout 0.1 --save-every 100000 --device cpu".split()


def require_same_student(found: Path, expected: Path) -> None:
    one, other = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    figures = [json.loads((out / "summary.json").read_text())["heldout"] for out in (found, expected)]
    assert figures[0] == figures[1]


def test_a_pipeline_whose_tasks_are_cancelled_requeued_and_preempted(trial: Trial) -> None:
    """check-data, six tasks of a dump, the rest of it, the training and the evaluation start by themselves."""
    slurm, work = trial.slurm, trial.work
    names = {
        **trial.names, "TASKS": 6, "TRAIN": "--cpus-per-task=2", "TRAIN_OPTIONS": " ".join(options(2)),
        "SBATCH_CPUS_PER_TASK": 2,
    }  # fmt: skip
    told = slurm.run("bash", EXAMPLES / "pipeline.sh", *DUMP, folder=trial.folder, **names).replace(",", "").split()
    jobs = dict(zip(told[::2], told[1::2], strict=True))
    assert slurm.state(jobs["train"]) == "PENDING"

    slurm.wait_running(f"{jobs['dump']}_1")
    slurm.run("scancel", f"{jobs['dump']}_1", f"{jobs['dump']}_4")
    until((trial.cache / "commits/00002.json").exists, trial.words)  # the first shard of this task
    slurm.run("scontrol", "requeue", f"{jobs['dump']}_2")
    until(lambda: slurm.state(jobs["train"]) == "RUNNING", trial.words)
    trial.require_the_cache_of_one()
    assert slurm.field(f"{jobs['dump']}_2", "Restarts") == "1"

    until((trial.out / "metrics.jsonl").exists, trial.words)
    node = slurm.field(jobs["train"], "NodeList")
    slurm.submit("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    trial.wait()
    told_by_training = (trial.folder / f"kdcache-train-{jobs['train']}.out").read_text()
    assert "stopped; what is finished is kept" in told_by_training
    assert slurm.field(jobs["train"], "Restarts") == "1" and slurm.state(jobs["train"]) == "COMPLETED"

    expected = trial.folder / "undisturbed"
    done = kdcache(*training(work, expected, *options(2)), env=one_thread())
    assert done.returncode == 0, done.stderr
    require_same_student(trial.out, expected)
    evaluation = json.loads((trial.folder / f"kdcache-evaluate-{jobs['evaluate']}.out").read_text())
    assert evaluation["positions"] > 0 and evaluation["nll"] > 0


def test_two_nodes_train_together_and_requeue_themselves(trial: Trial) -> None:
    """The signal is the one that `--signal` sends before a time limit."""
    slurm = trial.slurm
    trial.names["CACHE"] = trial.work / "whole"
    job = trial.submit("--nodes=2", EXAMPLES / "train.sbatch", *options(1))
    until((trial.out / "metrics.jsonl").exists, trial.words)
    slurm.run("scancel", "--signal=USR1", job)
    trial.wait()
    assert slurm.field(job, "Restarts") == "1" and slurm.state(job) == "COMPLETED", trial.words()
    assert "Exited with exit code 75" in trial.words()
    expected = Ranks(2, "-m", "kdcache_cli", *training(trial.work, trial.folder / "expected", *options(1)))
    _, words = expected.communicate()
    assert expected.returncode == 0, words
    require_same_student(trial.out, trial.folder / "expected")


@pytest.mark.long
def test_tasks_of_two_gpus_requeue_themselves(trial: Trial) -> None:
    slurm = trial.slurm
    job = trial.submit("--array=0-1", "--gpus-per-node=2", EXAMPLES / "dump.sbatch", *DUMP)
    trial.until_committed(1)
    slurm.run("scancel", "--signal=USR1", f"{job}_0")
    trial.wait()
    assert slurm.field(f"{job}_0", "Restarts") == "1", trial.words()
    trial.require_the_cache_of_one()


@pytest.mark.long
def test_an_array_that_is_cancelled_is_finished_by_another(trial: Trial) -> None:
    first = trial.submit("--array=0-1", EXAMPLES / "dump.sbatch", *DUMP)
    trial.until_committed(1)
    trial.slurm.run("scancel", first)
    trial.wait()
    assert trial.slurm.state(first) == "CANCELLED CANCELLED" and 0 < commits(trial.cache) < 18
    assert not list(trial.cache.rglob(".*.kdcache-tmp")), "a task that was cancelled left something unfinished"
    trial.submit("--array=0-2", EXAMPLES / "dump.sbatch", *DUMP)
    trial.wait()
    trial.require_the_cache_of_one()


def test_nodes_that_are_drained_and_fail(trial: Trial) -> None:
    """A task on a drained node ends there; one on a node that fails is requeued on another."""
    slurm = trial.slurm
    job = trial.submit("--array=0-2", "--exclusive", EXAMPLES / "dump.sbatch", *DUMP)
    for task in range(3):
        slurm.wait_running(f"{job}_{task}")
    nodes = [slurm.field(f"{job}_{task}", "NodeList") for task in range(3)]
    try:
        slurm.run("scontrol", "update", f"NodeName={nodes[0]}", "State=DRAIN", "Reason=test")
        slurm.run("scontrol", "update", f"NodeName={nodes[1]}", "State=DOWN", "Reason=test")
        trial.wait()
    finally:
        slurm.run("scontrol", "update", f"NodeName={nodes[0]},{nodes[1]}", "State=RESUME")
    assert [slurm.field(f"{job}_{task}", "Restarts") for task in range(3)] == ["0", "1", "0"]
    assert slurm.field(f"{job}_1", "NodeList") == nodes[2]
    trial.require_the_cache_of_one()
