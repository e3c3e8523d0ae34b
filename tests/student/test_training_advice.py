"""The facts of a training are those of its caches, its student and its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kdcache import open_cache
from kdcache.pretrained import load_model
from kdcache.student import training_advice
from kdcache.student.caches import open_sources
from kdcache.student.config import TrainConfig


def facts(cache: Path, student: Path, monkeypatch: pytest.MonkeyPatch, rows: int, **changes: Any) -> Any:
    config = TrainConfig(cache=(str(cache),), student=str(student), out="o", device="cpu", **changes)
    monkeypatch.setattr(training_advice, "of_training", lambda found: found)
    model = load_model(student, "student", "float32") if student.is_dir() else load_model_of(student)
    return training_advice.advise(config, open_sources(config), model, rows, None)


def load_model_of(config: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(config)))


def test_facts(cache: Path, teacher: Path, student_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_cache(cache)
    labels = sum(int((row.labels != -100).sum()) for row in opened)
    parameters = sum(p.numel() for p in load_model(teacher, "teacher", "float32").parameters())
    found = facts(cache, student_config, monkeypatch, 2 * len(opened))
    assert found.labels == pytest.approx(2 * labels)
    assert found.teacher_parameters == parameters > found.parameters  # the cache says so; the teacher is not looked for
    assert (found.trained, found.truncated, found.without_labels) == (False, True, True)
    assert facts(cache, teacher, monkeypatch, 1).trained
    for changes in (
        {"soft_weight": 0.9}, {"tail": "label"}, {"soft_schedule": "wsd"}, {"loss": "sampled-reverse-kl:3"},
    ):  # fmt: skip
        assert not facts(cache, student_config, monkeypatch, 1, **changes).without_labels


def test_the_labels_of_a_text_that_a_student_wrote_are_not_missed(cache: Path) -> None:
    manifest = open_cache(cache).manifest

    def of(generated: object) -> bool:
        changed = dataclasses.replace(manifest, origin={**manifest.origin, "generated": generated})
        return training_advice._written_by_a_student(changed)

    assert of({"writer_sha256": "0" * 64})
    assert not any(map(of, ({"writer_sha256": manifest.teacher_sha256}, {}, None)))
