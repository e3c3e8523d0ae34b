"""The engines vllm and server with a real vLLM, its CPU build, in an environment of its own.

tests/cluster/install_vllm.sh makes it; KDCACHE_VLLM_PYTHON names the Python of another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, open_cache
from kdcache.errors import ConfigError, LogitsError, ModelError
from kdcache.report.evaluate import evaluate
from kdcache.report.faithfulness import check_faithfulness
from kdcache.rows import PackedRow, RowSpec
from kdcache.teacher.dump import dump
from kdcache.teacher.engines.base import TargetRequest, TeacherSpec
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher
from tests.making import TEACHER, TEXTS, dump_options, make_model, make_tokenizer
from tests.teacher.test_dump import files

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("KDCACHE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed: run tests/cluster/install_vllm.sh"),
]

WIDE = {**TEACHER, "hidden_size": 128, "head_dim": 32, "max_position_embeddings": 4096, "pad_token_id": 0}
"""vLLM's attention on a CPU takes heads of 32 and more."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "gemma2": {**WIDE, "tie_word_embeddings": True, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0,
               "query_pre_attn_scalar": 32, "sliding_window": 64},
    "granite": {**WIDE, "logits_scaling": 3.0, "tie_word_embeddings": True},
}  # fmt: skip
LONG = RowSpec(vocab_size=320, seq_len=2000)
CHUNK = 256


def make_teacher(folder: Path, kind: str) -> Path:
    make_tokenizer(folder)
    make_model(folder, kind, **KINDS[kind])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("llama"), "llama")


def spec_of(folder: Path, *settings: str, **changes: Any) -> TeacherSpec:
    given = {"engine": "vllm", "engine_python": str(PYTHON), "engine_set": settings, **changes}
    return TeacherSpec(model=str(folder), **given)


CACHING = [pytest.param(False, id="no prefix caching"), pytest.param(True, id="prefix caching", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=CACHING)
def both(request: pytest.FixtureRequest, llama: Path) -> Iterator[tuple[OpenedTeacher, OpenedTeacher]]:
    """The engine vllm, which takes a long prompt in chunks, and the engine transformers."""
    settings = (f"max_num_batched_tokens={CHUNK}", f"enable_prefix_caching={str(request.param).lower()}")
    plain = TeacherSpec(model=str(llama), device="cpu")
    with open_teacher(spec_of(llama, *settings), LONG) as vllm, open_teacher(plain, LONG) as transformers:
        assert vllm.compute["prefix_caching"] is request.param and vllm.compute["chunk_tokens"] == CHUNK
        yield vllm, transformers


def long_rows() -> list[PackedRow]:
    """Pieces of 1 to 2,000 tokens, some of which begin alike."""
    rng = np.random.default_rng(5)
    begin = rng.integers(0, 320, 300)
    rows = []
    for lengths in ([2000], [1, 2, 3, 255, 256, 257, 500], [301, 400, 301, 998]):
        parts = [np.concatenate([begin, rng.integers(0, 320, max(0, n - 300))])[:n] for n in lengths]
        rows.append(
            PackedRow(
                tokens=np.concatenate(parts).astype(np.int32), piece_lengths=np.array(lengths, np.int32),
                piece_documents=np.arange(len(lengths)),
            )
        )  # fmt: skip
    return rows


SCALARS = ("log_partition", "log_tail", "entropy", "label_logprob")


def require_same(one: SparseTargets, two: SparseTargets, scalars: Sequence[str] = SCALARS, close: float = 1e-3) -> None:
    """Kept ids equal but for ties, every number within `close`."""
    mine, theirs = one.ids.sort(-1), two.ids.sort(-1)
    other = (mine.values != theirs.values).any(-1)
    near = (one.logprobs[:, -1] - two.logprobs[:, -1]).abs() < 1e-4
    assert not (other & ~near).any()
    values = [each.logprobs.gather(-1, order.indices)[~other] for each, order in ((one, mine), (two, theirs))]
    torch.testing.assert_close(*values, rtol=0, atol=close)
    for name in scalars:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=close, equal_nan=True)


RULES = {
    "topk": (Selection(k=16), (1.0, 2.0)),
    "forced": (Selection(k=16, force_label=True), (2.0, 1.0)),
    "full": (Selection(kind="full"), (1.0,)),
}


@pytest.mark.parametrize("name", RULES)
def test_targets_are_those_of_transformers(both: tuple[OpenedTeacher, OpenedTeacher], name: str) -> None:
    request = TargetRequest(selection=RULES[name][0], temperatures=RULES[name][1])
    vllm, transformers = (teacher.targets(long_rows(), request).targets for teacher in both)
    require_same(vllm, transformers)


@pytest.mark.parametrize(
    "rule", [Selection(kind="ipps", k=16), Selection(kind="sample", draws=20)], ids=["ipps", "sample"]
)
def test_draws_are_those_of_the_position(both: tuple[OpenedTeacher, OpenedTeacher], rule: Selection) -> None:
    """The random numbers are those of shard, row and slot, so nearly all draws fall on the same ids."""
    request = TargetRequest(selection=rule, seed=3)
    vllm, transformers = (t.targets(long_rows(), request, shard=2, first_row=7).targets for t in both)
    same = (vllm.ids == transformers.ids).all(-1) & (vllm.count == transformers.count)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(vllm.weights[same], transformers.weights[same], rtol=0, atol=1e-3)
    torch.testing.assert_close(vllm.log_partition, transformers.log_partition, rtol=0, atol=1e-3)


def test_logits_and_hidden_states_are_those_of_transformers(both: tuple[OpenedTeacher, OpenedTeacher]) -> None:
    logits = [torch.cat(list(teacher.logits(long_rows()[1:], every_slot=True))) for teacher in both]
    assert logits[0].shape[1] == 320
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)
    request = TargetRequest(selection=Selection(k=4), extras=("hidden:-1",))
    states: list[Tensor] = [t.targets(long_rows(), request).extras["hidden:-1"] for t in both]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_soft_caps_scales_and_tied_heads(kind: str, tmp_path: Path) -> None:
    folder, shape = make_teacher(tmp_path / kind, kind), RowSpec(vocab_size=320, seq_len=128)
    request = TargetRequest(selection=Selection(k=16), temperatures=(1.0, 2.0))
    rng = np.random.default_rng(1)
    row = PackedRow(
        tokens=rng.integers(0, 320, 128).astype(np.int32), piece_lengths=np.array([100, 28], np.int32),
        piece_documents=np.arange(2),
    )  # fmt: skip
    found = []
    for spec in (spec_of(folder), TeacherSpec(model=str(folder), device="cpu")):
        with open_teacher(spec, shape) as opened:
            found.append(opened.targets([row], request).targets)
    require_same(*found)


def test_two_processes_hold_one_teacher(llama: Path, corpus: Path, tmp_path: Path) -> None:
    options = {"engine": "vllm", "engine_python": str(PYTHON), "limit_docs": 40, "device": "auto"}
    dump(dump_options(llama, corpus, tmp_path / "two", tensor_parallel=2, **options))
    assert open_cache(tmp_path / "two").commits[0].compute["tensor_parallel"] == 2
    assert check_faithfulness(tmp_path / "two", str(llama), rows=3, device="cpu")["agrees"]


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, of each of which the teacher is told something else first."""
    path = tmp_path_factory.mktemp("hinted") / "corpus.jsonl"
    records = [{"text": text, "teacher_prompt": "It ends so:" + text[-12:] + ". "} for text in TEXTS[:40]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


HINTS = {"teacher_system": "You know all of it. ", "docs_per_shard": 20}


def require_same_targets(one: Path, two: Path, scalars: Sequence[str] = SCALARS) -> None:
    """The same rows, and targets that are equal but for ties and what float32 leaves open."""
    mine, theirs = open_cache(one), open_cache(two)
    assert len(mine) == len(theirs) > 0
    for a, b in ((mine[index], theirs[index]) for index in range(len(mine))):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        require_same(a.targets[a.labels != -100], b.targets[b.labels != -100], scalars)


def test_a_teacher_that_reads_more_than_its_student(llama: Path, hinted: Path, tmp_path: Path) -> None:
    dump(dump_options(llama, hinted, tmp_path / "plain", **HINTS))
    how = {"engine": "vllm", "engine_python": str(PYTHON), "device": "auto"}
    dump(dump_options(llama, hinted, tmp_path / "vllm", **HINTS, **how))
    require_same_targets(tmp_path / "vllm", tmp_path / "plain")
    assert check_faithfulness(tmp_path / "vllm", str(llama), rows=3, device="cpu")["agrees"]


def test_a_killed_process_loses_one_shard(llama: Path, corpus: Path, student_config: Path, tmp_path: Path) -> None:
    """The cache is completed by the same command, and is that of a run that nobody disturbed, byte for byte."""
    command = [
        sys.executable, "-m", "kdcache_cli", "dump-teacher", "--teacher", llama, "--corpus", corpus, "--k", "8",
        "--engine", "vllm", "--engine-python", PYTHON, "--seq-len", "64", "--docs-per-shard", "12", "--batch-rows", "1",
        "--json",
    ]  # fmt: skip
    cut = tmp_path / "cut"
    running = subprocess.Popen([*map(str, command), "--out", str(cut)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 900
    while len(list(cut.glob("commits/*.json"))) < 2:
        assert running.poll() is None and time.monotonic() < until, running.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    [worker] = [int(pid) for pid in children if b"kdcache_vllm" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    said = running.communicate(timeout=900)[1]
    assert running.returncode == 2 and "the process of the engine vllm ended by signal 9" in said.splitlines()[-1]
    assert 2 <= len(list(cut.glob("commits/*.json"))) < 9
    for out in (cut, tmp_path / "whole"):
        done = subprocess.run([*map(str, command), "--out", str(out)], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["complete"]
    shards = [{n: d for n, d in files(out).items() if n.startswith("shards")} for out in (cut, tmp_path / "whole")]
    assert shards[0] == shards[1]
    how = {"engine": "vllm", "engine_options": {"engine_python": str(PYTHON)}}
    assert check_faithfulness(cut, str(llama), rows=2, **how)["agrees"]
    figures = evaluate(str(student_config), str(cut), str(llama), rows=2, **how)
    assert figures["dense_kl"] > 0.1


def test_a_sick_teacher_and_one_that_vllm_does_not_know(llama: Path, corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sick = shutil.copytree(llama, tmp_path / "sick")
    weights = load_file(sick / "model.safetensors")
    weights["model.embed_tokens.weight"][319] = torch.inf
    save_file(weights, sick / "model.safetensors", {"format": "pt"})
    row = PackedRow(
        tokens=np.array([3, 4, 5, 6, 319, 7, 8, 9], np.int32), piece_lengths=np.array([3, 5], np.int32),
        piece_documents=np.array([4, 9]),
    )  # fmt: skip
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(LogitsError, match="infinite in document 9 of the corpus, "),
    ):
        patch.setattr("kdcache.teacher.engines.vllm.require_faithful", lambda *_: None)
        with open_teacher(spec_of(sick), RowSpec(vocab_size=320, seq_len=8)) as opened:
            opened.targets([row], TargetRequest(selection=Selection(k=8)))
    config = json.loads((sick / "config.json").read_text())
    (sick / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(ModelError, match=r"vLLM 0\.32\.0 has no class for NobodyForCausalLM"):
        dump(dump_options(sick, corpus, tmp_path / "c", engine="vllm", engine_python=str(PYTHON), device="auto"))
    assert not (tmp_path / "c").exists()


class Server:
    """`python -m vllm.entrypoints.openai.api_server`, really run."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log, self.options = folder, log, options
        self.address = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder, "--host", "127.0.0.1",
                    "--port", str(self.port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
                    *self.options,
                ],
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
                     "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            )  # fmt: skip
        until = time.monotonic() + 900
        while True:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_served_teacher(corpus: Path, hinted: Path, tmp_path: Path) -> None:
    """Its top k are those of transformers; killed in mid-shard and started again, the cache is completed."""
    llama = tmp_path / "llama"
    make_tokenizer(llama)
    make_model(llama, **{**WIDE, "vocab_size": 320})  # a server would give random padding its share
    options = {"temperatures": "1", "docs_per_shard": 12, "k": 24}
    dump(dump_options(llama, corpus, tmp_path / "plain", **options))
    dump(dump_options(llama, hinted, tmp_path / "plain-hinted", **{**options, **HINTS}))
    options |= {"engine": "server", "device": "auto", "engine_set": ("concurrency=4", "retries=1")}
    server = Server(llama, tmp_path / "log", "--max-logprobs", "24")
    with server, pytest.raises(ModelError, match="does not answer") as caught:

        def kill_after_two_shards(_done: int, _total: int, _positions: int) -> None:
            if len(list((tmp_path / "served").glob("commits/*.json"))) >= 2:
                os.killpg(server.process.pid, signal.SIGKILL)

        dump(dump_options(server.address, corpus, tmp_path / "served", **options), kill_after_two_shards)
    assert "\n" not in str(caught.value)
    assert 2 <= len(list((tmp_path / "served").glob("commits/*.json"))) < 9
    with server:
        summary = dump(dump_options(server.address, corpus, tmp_path / "served", **options))
        dump(dump_options(server.address, hinted, tmp_path / "served-hinted", **{**options, **HINTS}))
        with pytest.raises(ConfigError, match=r"k is 25, above .* \(it allows 24\); start it with --max-logprobs 25"):
            dump(dump_options(server.address, corpus, tmp_path / "more", **{**options, "k": 25}))
    assert summary["complete"] and not (tmp_path / "more").exists()
    known = open_cache(tmp_path / "served").known
    assert known.tail_sum == "remainder" and not known.entropy
    scalars = ("log_tail", "label_logprob")  # entropy and partitions are what it does not know
    require_same_targets(tmp_path / "served", tmp_path / "plain", scalars)
    require_same_targets(tmp_path / "served-hinted", tmp_path / "plain-hinted", scalars)
