"""Advice: given where something usually goes wrong, and nowhere else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from kdcache.advice import TrainingFacts, of_data, of_made_student, of_ratio, of_training, usual_learning_rate

GOOD = TrainingFacts(
    parameters=100_000_000, trained=True, adapters=False, teacher_parameters=900_000_000, labels=1e8, truncated=True,
    without_labels=False, lr=5e-4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"teacher_parameters": 1_000_000_000}, None),
        ({"teacher_parameters": 1_100_000_000}, "11.0 times the parameters"),
        ({"teacher_parameters": None}, None),
        ({"trained": False, "labels": 2e9}, None),
        ({"trained": False, "labels": 1.9e9}, "19 tokens a parameter"),
        ({"without_labels": True}, "soft_weight 0.9"),
        ({"without_labels": True, "truncated": False}, None),
        ({"lr": 7e-3}, "more than 10 times the 0.0007"),
        ({"lr": 7e-3, "adapters": True}, None),
        ({"lr": 1e-5}, None),
        ({"lr": 1e-5, "trained": False, "labels": 1e10}, "more than 10 times below the 0.0007"),
        ({"lr": 1e-7}, "more than 100 times below"),
    ],
)
def test_a_training(changes: dict[str, Any], words: str | None) -> None:
    found = of_training(dataclasses.replace(GOOD, **changes))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_a_learning_rate_falls_with_size() -> None:
    """Kaplan et al., D.1, by hand: at e^20 parameters 0.003239 - 20 x 0.0001395."""
    assert usual_learning_rate(round(math.exp(20))) == pytest.approx(0.000449, abs=1e-9)
    assert usual_learning_rate(10**12) == 3e-5
    assert usual_learning_rate(0) == 0.003239


def test_sizes() -> None:
    assert of_ratio(100, 10) == [] and len(of_ratio(101, 10)) == 1
    made = {"parameters": {"teacher": 10, "student": 9}, "teacher_sha256": "a"}
    assert of_made_student(made, "a") == of_made_student(made, None) == []
    assert "not one of this teacher" in of_made_student(made, "b")[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"dropped": {"min-chars": 50}}, None),
        ({"dropped": {"min-chars": 20, "empty": 31}}, "51 of 100 documents are left out, most of them for empty"),
        ({"lengths": {"median": 15}}, "at most 15 tokens"),
        ({"lengths": {}, "rows": 0, "labels": 0}, None),
        ({"labels": 0}, "nothing will be taught"),
    ],
)
def test_a_corpus(changes: dict[str, Any], words: str | None) -> None:
    good = {"documents": 100, "dropped": {}, "lengths": {"median": 16}, "rows": 5, "labels": 9}
    found = of_data({**good, **changes})
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
