"""Advice: what usually goes wrong with what a command was given, in a sentence each.

Guarantee: advice is made of plain numbers, changes nothing, and names fields as the errors do. What cannot work at all
is an error, not advice (a temperature that the cache lacks, for one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_RATIO = 10
"""Parameters of the teacher by those of the student; an experiment of ours with 11, from random weights, failed."""
ENOUGH_TOKENS = 20
"""Tokens a parameter, from which on fresh weights are trained in full: Hoffmann et al. 2022 (arXiv 2203.15556)."""
SHORT = 16
"""Tokens of a document that teaches little."""
FAR = 10
"""A learning rate that is so many times another is far from it."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a training was given.

    Attributes:
        parameters: of the student.
        trained: whether its weights were trained before.
        adapters: whether only adapters are trained.
        teacher_parameters: None if they are not known.
        labels: tokens that it will learn from, each as often as it comes.
        truncated: whether the targets hold the largest entries and one number for the rest.
        without_labels: whether neither a label term nor the tail makes use of labels, and these are not a student's own
            words.
        lr: the peak learning rate.
    """

    parameters: int
    trained: bool
    adapters: bool
    teacher_parameters: int | None
    labels: float
    truncated: bool
    without_labels: bool
    lr: float


def of_training(facts: TrainingFacts) -> list[str]:
    """Advice on a training."""
    found = []
    if facts.teacher_parameters is not None:
        found += of_ratio(facts.teacher_parameters, facts.parameters)
    if not facts.trained and facts.labels < ENOUGH_TOKENS * facts.parameters:
        found.append(
            f"the student begins from random weights and will see {facts.labels / facts.parameters:.2g} tokens a "
            f"parameter; below {ENOUGH_TOKENS} it stays far from what its size can do: train longer, take a smaller "
            "one, or begin from a checkpoint or from a part of the teacher (init_from)"
        )
    if facts.truncated and facts.without_labels:
        found.append(
            "there is no label term, and the cache keeps only the largest entries of each position: nothing then "
            "teaches which of the other tokens is right; soft_weight 0.9 adds a label term"
        )
    usual = usual_learning_rate(facts.parameters)
    lowest = usual / FAR**2 if facts.trained else usual / FAR  # further training takes less
    if facts.lr > FAR * usual and not facts.adapters:
        found.append(
            f"lr is {facts.lr:g}, more than {FAR} times the {usual:.1g} that suits {_short(facts.parameters)} "
            "parameters: if the loss jumps or is not finite, lower it first"
        )
    elif facts.lr < lowest and not facts.adapters:
        found.append(
            f"lr is {facts.lr:g}, more than {FAR**2 if facts.trained else FAR} times below the {usual:.1g} that suits "
            f"{_short(facts.parameters)} parameters: if the loss hardly falls, raise it first"
        )
    return found


def of_ratio(teacher: int, student: int) -> list[str]:
    """Advice on the sizes of teacher and student, in parameters."""
    if teacher <= MOST_RATIO * student:
        return []
    return [
        f"the teacher has {teacher / student:.1f} times the parameters of the student; above {MOST_RATIO} a student "
        "seldom comes near its teacher (an experiment at 11, from random weights, failed): keep more of the teacher, "
        "or go by a student of a size between"
    ]


def of_made_student(made: Mapping[str, Any], cache_teacher: str | None) -> list[str]:
    """Advice on a student that was cut out of its teacher.

    Args:
        made: `parameters` and `teacher_sha256` of it.
        cache_teacher: sha256 of the teacher of the cache that it was measured on; None if there was none.
    """
    found = of_ratio(made["parameters"]["teacher"], made["parameters"]["student"])
    if cache_teacher is not None and cache_teacher != made["teacher_sha256"]:
        found.append("the cache is not one of this teacher, so the KL is that to another model")
    return found


def of_data(found: Mapping[str, Any]) -> list[str]:
    """Advice on a corpus, from what `check-data` found."""
    advice, left_out, median = [], sum(found["dropped"].values()), found["lengths"].get("median", 0)
    if left_out > found["documents"] / 2:
        most = max(found["dropped"], key=lambda reason: found["dropped"][reason])
        advice.append(
            f"{left_out:,} of {found['documents']:,} documents are left out, most of them for {most}: look at the "
            "columns and the filters before you dump"
        )
    if found["lengths"] and median < SHORT:
        advice.append(
            f"half of the documents have at most {median:,} tokens, of which hardly any has a context to be "
            "predicted from: is one document one line, where it should be a paragraph or a file (split_text)?"
        )
    if found["rows"] and not found["labels"]:
        advice.append("no token carries a target: nothing will be taught")
    return advice


def usual_learning_rate(parameters: int) -> float:
    """A peak learning rate of AdamW that suits a size: Kaplan et al. 2020 (arXiv 2001.08361), equation D.1.

    It was fitted up to some 10^9 parameters; above 10^10 it would be negative, and is held at 3e-5.
    """
    return max(3e-5, 0.003239 - 0.0001395 * math.log(max(parameters, 1)))


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
