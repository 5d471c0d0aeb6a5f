"""A linearized model that ComfyUI's own compile node compiles to machine code."""

import shutil
import unittest
from typing import Any

import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from linvideo_pack.nodes.patching.apply import linearize
from stage import (
    assert_close,
    relative_difference,
    sample,
    short_demo,
    short_file,
    tolerance_of,
)
from torch._dynamo.utils import counters


def test_it_compiles_once_without_a_break_and_gives_the_same_latents() -> None:
    """With the node's backend and its guards; queued again, nothing is compiled."""
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise unittest.SkipTest("needs a C++ compiler, which inductor calls")
    before = sample(short_demo())
    linearized = linearize(short_demo(), short_file())
    expected = sample(linearized)
    assert relative_difference(expected, before) > 0.02
    compiled = TorchCompileModel.execute(linearized, "inductor").result[0]
    assert _count_graphs(compiled, expected) == _count_graphs(compiled, expected) == 1
    assert not counters["graph_break"], counters["graph_break"]
    assert torch.equal(sample(short_demo()), before)


def _count_graphs(compiled: Any, expected: torch.Tensor) -> int:
    assert_close(sample(compiled), expected, tolerance_of(compiled))
    return counters["stats"]["unique_graphs"]
