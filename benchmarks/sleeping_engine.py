"""An engine that sleeps instead of computing: a plug-in for checks of everything but the teacher.

A batch takes `SLEEP_SECONDS` (an environment variable), on a machine however busy; its logits are all alike.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from kdcache import register_engine
from kdcache.rows import RowSpec
from kdcache.teacher.engines.base import Engine, EngineOutput, Logits, TeacherSpec


@register_engine
class Sleeping(Engine):
    name = "sleeping"

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:  # noqa: ARG002
        self.vocab, self.seconds = rows.vocab_size, float(os.environ["SLEEP_SECONDS"])

    def run(self, batch: Any, request: Any) -> EngineOutput:  # noqa: ARG002
        time.sleep(self.seconds)
        return EngineOutput(positions=Logits(torch.linspace(0, 8, self.vocab).expand(len(batch.slots), -1)))
