"""The hybrid kernels are timed beside the layers they stand between, once they are right."""

import importlib.util
import os

import pytest
import torch

from benchmarks.kernels import hybrid
from benchmarks.kernels.contenders import Setting, Shape
from benchmarks.kernels.speed import SHAPES
from linvideo_core.kernels.tiles import Tiles

TILES = Tiles(grid=(2, 3, 4), tile=(1, 2, 3))
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
            reason="needs Triton's interpreter",
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_compares_hybrid_with_linear_and_softmax(device: str) -> None:
    setting = Setting(torch.device(device), seconds=0.001)
    rows = hybrid.measure({Shape(24, 2): [TILES]}, setting, 2**10)
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert (row["shape"], row["tile"]) == ("24 x 2", "1x2x3")
        # Of each frame: one tile of 2 x 3 tokens, and what is left of it at the edges.
        assert row["share_of_tokens"] == pytest.approx(2 * (36 + 4 + 9 + 1) / 24**2)
        assert row["over_linear"] == pytest.approx(row["hybrid_ms"] / row["linear_ms"])
        assert row["vs_softmax"] == pytest.approx(row["softmax_ms"] / row["hybrid_ms"])
        assert row["floor_ratio"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_that_is_off_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(torch.device(device))
    # The interpreter rounds to bf16 towards zero.
    most = 1e-2 if device == "cuda" else 4e-2
    monkeypatch.setattr(hybrid, "TOLERANCE", most)
    assert 0 < hybrid.check([TILES], 2, setting) < most
    monkeypatch.setattr(hybrid, "TOLERANCE", 1e-9)
    with pytest.raises(RuntimeError, match="differs from its definition in fp64 by"):
        hybrid.check([TILES], 2, setting)


def test_the_tiles_that_are_timed_are_about_as_large_as_they_say() -> None:
    assert tuple(hybrid.CASES) == SHAPES
    for shape, tilings in hybrid.CASES.items():
        assert {tiles.num_tokens for tiles in tilings} == {shape.tokens}
    shares = [round(100 * t.share, 1) for tilings in hybrid.CASES.values() for t in tilings]
    assert shares == [0.3, 1.0, 1.8, 0.3, 1.0, 1.8, 0.3, 1.0, 2.2]
