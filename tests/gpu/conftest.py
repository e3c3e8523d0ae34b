"""The devices of these tests: the CPU, so that what a test says is tried everywhere, and a GPU under the mark `gpu`."""

from __future__ import annotations

import pytest
import torch

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs; each test that takes it runs once on each device."""
    return str(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.long), GPU])
def device_of_commands(request: pytest.FixtureRequest) -> str:
    """The same for tests that take seconds: on a CPU they compare it with itself, and other tests run all of it."""
    return str(request.param)
