"""Launches are compared once they give the same numbers, and are as they were afterwards."""

import os

import pytest
import torch

from benchmarks.kernels import launches
from benchmarks.kernels.contenders import Setting, Shape
from linvideo_core.kernels.tiles import Tiles
from linvideo_core.run.errors import SettingError

triton_launch = pytest.importorskip("linvideo_core.kernels.triton_launch")
TILES = Tiles(grid=(2, 3, 4), tile=(1, 2, 3))
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("kind", ["map", "hybrid backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_each_launch_has_a_row_beside_the_present_one(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "list_launches", lambda _: [(32, 4, 1, 1)])
    # The interpreter rounds to bf16 towards zero.
    monkeypatch.setattr(launches, "TOLERANCE", 4e-2)
    setting = Setting(torch.device(device), seconds=0.001)
    usual = dict(triton_launch.launches_of(setting.device, setting.dtype))
    present, other = launches.measure_kind(kind, Shape(24, 1), TILES, setting)
    assert (present["is_present"], present["over_present"]) == (True, 1)
    assert (other["tokens"], other["is_present"]) == (32, False) and other["milliseconds"] > 0
    assert triton_launch.launches_of(setting.device, setting.dtype) == usual
    monkeypatch.setattr(launches, "TOLERANCE", 0)
    assert list(launches.measure_kind("map", Shape(24, 1), TILES, setting)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": "map,guess"}, "'guess' is unknown; of reduce keys, map, "),
        ({"shape": "1 x 1"}, "'1 x 1' is unknown; of 32760 x 12, "),
    ],
)
def test_unknown_kinds_and_shapes_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        launches.LaunchesConfig(**settings)
