"""Where tests of fused kernels run, and what they share."""

import os
from collections.abc import Iterator

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="compiled for a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2 if IS_INTERPRETED else 1e-2}
"""Relative error of attention against fp64, of value and gradients, by dtype."""
TOLERANCE[torch.float16] = TOLERANCE[torch.bfloat16]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run."""
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
