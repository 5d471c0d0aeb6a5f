"""Whole models are compared honestly: agreement first, real shapes, one run, nothing zero."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import hybrid
from benchmarks.kernels.agreement import relative_error
from benchmarks.kernels.contenders import Contender, Shape
from benchmarks.models import cli as benchmark
from benchmarks.models import measuring, whole_video
from benchmarks.models.cli import ScaleConfig
from benchmarks.models.measuring import (
    COMPUTED,
    SAMPLED,
    RandomTeacher,
    Variant,
    find_softmax,
    plan_variants,
)
from benchmarks.models.random_models import count_bytes, make_random_wan
from benchmarks.models.sizes import SIZES, find_peak, spread_layers
from linvideo_core.kernels.tiles import Tiles
from linvideo_core.models.config import read_tile
from linvideo_core.models.wan import WanModel
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_tensors

SMALL = measuring.shrink(SIZES["tiny"])
DEFAULT, _ = find_softmax("cpu")


def make_measured(**changes: Any) -> dict[str, Any]:
    """Return a measurement of an all-softmax model by FlashAttention-2, with changes."""
    usual = {"num_linear": 0, "kept": "fa2", "is_compiled": False, "seconds": 1.0, "peak_gb": 3.0}
    return usual | {"video_seconds": 100.0, "video": COMPUTED} | changes


def rows_of(size: str, *measured: dict[str, Any], device: str = "NVIDIA H200") -> list[Any]:
    return measuring.to_rows(
        {"size": size, "where": "headless", "device": device, "rows": measured}
    )


def test_sizes_are_the_published_ones() -> None:
    tokens = {name: SIZES[name].tokens for name in ("1.3b-480p", "14b-480p", "14b-720p")}
    assert tokens == {"1.3b-480p": 32760, "14b-480p": 32760, "14b-720p": 75600}
    assert [len(SIZES[name].layers) for name in tokens] == [16, 22, 22]
    assert 0 not in {layer for size in SIZES.values() for layer in size.layers}
    assert len(set(spread_layers(40, 22))) == 22 and max(spread_layers(40, 22)) < 40
    for name, billions in (("1.3b-480p", 1.42), ("14b-480p", 14.3)):
        with torch.device("meta"):
            model = WanModel(SIZES[name].config)
        assert count_bytes([model]) / 4e9 == pytest.approx(billions, rel=0.01)


def test_whole_models_have_tiles_that_the_kernels_are_timed_with() -> None:
    for name, percents in (
        ("1.3b-480p", [0.3, 1.8]),
        ("14b-480p", [0.3, 1.8]),
        ("14b-720p", [0.3, 2.2]),
    ):
        size = SIZES[name]
        tilings = [Tiles(grid=size.grid, tile=read_tile(tile)) for tile in size.tiles]
        assert [round(100 * tiles.share, 1) for tiles in tilings] == percents
        timed = hybrid.CASES[Shape(size.tokens, size.config.num_heads)]
        assert all(tiles in timed for tiles in tilings)


def test_every_weight_is_random_and_a_name_decides_which() -> None:
    first, again = (make_random_wan(SMALL, "cpu", torch.float32) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert parameter.count_nonzero() == parameter.numel(), name
        assert torch.equal(parameter, again.get_parameter(name)), name
    keys = (first.get_parameter(f"blocks.{i}.self_attn.k.weight") for i in range(2))
    assert not torch.equal(*keys)


def test_a_card_that_is_not_known_has_no_share_of_its_peak() -> None:
    assert find_peak("NVIDIA H200") == find_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert find_peak("NVIDIA H100 PCIe") == 756e12
    assert find_peak("NVIDIA L40S") != find_peak("NVIDIA L4")
    assert find_peak("CPU, 2 threads") is None and find_peak("NVIDIA X9000") is None
    assert rows_of("tiny", make_measured(), device="NVIDIA X9000")[0]["mfu"] is None


def test_arranged_models_agree_with_the_plain_one() -> None:
    rows = measuring.check_size(SIZES["tiny"], DEFAULT, "cpu")
    assert [row["num_linear"] for row in rows] == [0, 1]
    assert rows[0]["error"] == 0
    assert rows[1]["error"] < 1e-5


def test_models_without_softmax_layers_agree_with_their_definition() -> None:
    rows = measuring.check_size(SIZES["tiny"], DEFAULT, "cpu", every_layer=True)
    assert [(row["num_linear"], row["tile"], row["kept"]) for row in rows] == [
        (0, None, "default"), (1, None, "default"), (2, None, None), (2, "1x5x7", None),
    ]  # fmt: skip
    assert all(row["error"] < 1e-5 for row in rows)


def test_rounding_on_a_gpu_hides_no_forgotten_tile() -> None:
    plan = plan_variants(SMALL, ["default"], every_layer=True)
    expected = measuring._compute_expected(SMALL, plan, None, "cpu")
    linear, tiled = expected[(0, 1), None], expected[(0, 1), SMALL.tiles[0]]
    assert relative_error(linear, tiled) > 1.2 * measuring._TOLERANCE[torch.bfloat16]


def test_a_wrong_hybrid_layer_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, compute_expected = SIZES["tiny"], measuring._compute_expected

    def forget_tiles(*given: Any) -> dict[Any, torch.Tensor]:
        found = compute_expected(*given)
        return {(layers, tile): found[layers, None] for layers, tile in found}

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_compute_expected", forget_tiles)
        with pytest.raises(RuntimeError, match=r"tile='1x5x7', .* differs from .*; nothing was"):
            measuring.check_size(tiny, DEFAULT, "cpu", every_layer=True)
    monkeypatch.setattr(hybrid, "hybrid_attention", lambda query, key, value, *_, **__: value)
    with pytest.raises(RuntimeError, match="differs from its definition in fp64 by"):
        measuring.measure_size(tiny, DEFAULT, 0.0, "cpu", every_layer=True)


def test_a_wrong_backend_is_never_timed() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value + query

    wrong = {"default": Contender("sdpa", "softmax", attend)}
    with pytest.raises(RuntimeError, match=r"differs from the plain model by .*; nothing was"):
        measuring.check_size(SIZES["tiny"], wrong, "cpu")
    agreeing, _, left_out = measuring.check_kernels(wrong, "cpu")
    assert not agreeing and "sdpa" in left_out[0]


def test_a_model_is_given_back_as_it_was() -> None:
    teacher = RandomTeacher(SMALL, DEFAULT, "cpu")
    with torch.inference_mode():
        before = teacher.call_model()
        with teacher.arranged(Variant(layers=(1,), kept="default")) as call:
            linear = call()
        assert torch.equal(teacher.call_model(), before)
    assert not torch.allclose(linear, before)


def test_pairs_that_are_compared_are_measured_side_by_side() -> None:
    plan = plan_variants(SIZES["1.3b-480p"], ["fa2", "default"], compiled=True)
    assert [(len(v.layers), v.kept, v.is_compiled) for v in plan] == [
        (0, "fa2", False), (16, "fa2", False), (0, "default", False), (16, "default", False),
        (0, "fa2", True), (16, "fa2", True), (0, "default", True), (16, "default", True),
    ]  # fmt: skip


def test_models_without_softmax_layers_are_measured_beside_the_first_backend() -> None:
    plan = plan_variants(SIZES["14b-720p"], ["default", "fa2"], every_layer=True)
    assert [(len(v.layers), v.tile, v.kept) for v in plan] == [
        (0, None, "default"), (22, None, "default"),
        (40, None, None), (40, "3x9x8", None), (40, "7x15x16", None),
        (0, None, "fa2"), (22, None, "fa2"),
    ]  # fmt: skip


def test_ratios_are_to_the_softmax_model_of_the_same_run() -> None:
    rows = rows_of(
        "14b-720p",
        make_measured(seconds=8.0),
        make_measured(seconds=5.0, num_linear=22),
        make_measured(seconds=6.0, kept="cudnn"),
        make_measured(seconds=4.0, kept="cudnn", num_linear=22),
        make_measured(seconds=7.5, is_compiled=True),
        make_measured(seconds=3.75, num_linear=22, is_compiled=True),
        make_measured(seconds=3.0, kept="cudnn", num_linear=22, is_compiled=True),
    )
    found = {(r["baseline"], r["linear_layers"], r["kept_layers"], r["compiled"]): r for r in rows}
    assert {key: row["speedup"] for key, row in found.items()} == {
        ("fa2", 0, "fa2", False): 1.0,
        ("fa2", 22, "fa2", False): 1.6,
        ("fa2", 22, "cudnn", False): 2.0,
        ("cudnn", 0, "cudnn", False): 1.0,
        ("cudnn", 22, "cudnn", False): 1.5,
        ("fa2", 0, "fa2", True): 1.0,
        ("fa2", 22, "fa2", True): 2.0,
        ("fa2", 22, "cudnn", True): 2.5,
    }
    assert found["fa2", 0, "fa2", False]["mfu"] == pytest.approx(6.6e15 / 8 / 989.4e12, rel=0.05)


def test_a_video_too_long_to_sample_is_computed_and_said_to_be() -> None:
    teacher = RandomTeacher(dataclasses.replace(SMALL, num_frames=1), DEFAULT, "cpu")
    variant = Variant(layers=(1,), kept="default")
    computed = measuring.measure(teacher, variant, 0.0, "cpu")
    assert computed["video"] == COMPUTED
    assert computed["video_seconds"] == pytest.approx(100 * computed["seconds"])
    sampled = measuring.measure(teacher, variant, math.inf, "cpu")
    assert sampled["video"] == SAMPLED and sampled["video_seconds"] > 0
    assert sampled["peak_gb"] > teacher.weight_bytes() / 2**30


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--shapes 2b given; names of 1\.3b-480p"):
        ScaleConfig(shapes="2b")


def test_the_command_replaces_the_rows_of_its_size_and_keeps_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--video-seconds", "0.0"]
    command, path = [*flags, "--out", str(tmp_path)], tmp_path / "scale.json"
    benchmark.main(command)
    record = json.loads(path.read_text(encoding="utf-8"))
    measured_again = "--device cpu --shapes tiny --video-seconds 0.0"
    assert record["command"] == f"python -m benchmarks.models {measured_again}"
    assert [(r["linear_layers"], r["baseline"], r["what"]) for r in record["rows"]] == [
        (0, "default", "denoise"), (2, "default", "denoise"),
    ]  # fmt: skip
    assert "tiny Wan" in capsys.readouterr().out
    [run] = record["details"]["parts"]["denoise"]["runs"]
    record["details"]["parts"]["denoise"]["runs"] = [{**run, "size": "14b-720p"}, run]
    path.write_text(json.dumps(record), encoding="utf-8")
    benchmark.main(command)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert [row["model"] for row in again["rows"]] == 2 * ["Wan 14B"] + 2 * ["tiny Wan"]


@pytest.mark.gpu
# Each backend is compiled four times: two show it.
@pytest.mark.parametrize(("wanted", "compiled"), [(None, False), (("fa2", "default"), True)])
def test_a_size_on_a_gpu_compares_all_backends(
    wanted: tuple[str, ...] | None, compiled: bool
) -> None:
    softmax, _ = find_softmax("cuda")
    softmax = {name: found for name, found in softmax.items() if not wanted or name in wanted}
    found = measuring.measure_size(SIZES["tiny"], softmax, 0.0, "cuda", compiled=compiled)
    rows = measuring.to_rows({**found, "device": torch.cuda.get_device_name()})
    assert {row["compiled"] for row in rows} == {False, compiled}
    assert {"fa2", "default"} <= {row["baseline"] for row in rows}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)


def test_whole_videos_of_a_file_are_timed_in_turns(tmp_path: Path) -> None:
    path, order = tmp_path / "model.safetensors", []
    write_tensors(path, make_random_wan(SMALL, "cpu", torch.float32).state_dict())
    size = {"num_frames": 1, "height": 64, "width": 64, "linear_layers": 1, "turns": 2}
    config = whole_video.VideoConfig(model=path, steps=1, device="cpu", **size)
    teacher, student = whole_video.run(config)
    counts = ("linear_layers", "hybrid_layers", "layers")
    assert [teacher[name] for name in counts] == [0, 0, 2]
    assert [student[name] for name in counts] == [1, 0, 2]
    assert teacher["tokens"] == 16 and len(student["turns"]) == 2
    first, second = (x / y for x, y in zip(teacher["turns"], student["turns"], strict=True))
    assert student["speedup"] == pytest.approx((first + second) / 2)
    assert student["seconds"] == pytest.approx(sum(student["turns"]) / 2)

    @contextlib.contextmanager
    def enter(name: str) -> Iterator[None]:
        order.append(name)
        yield
        order.append("left")

    whole_video.time_in_turns(("teacher", "student"), 2, enter, lambda name, turn: None, "cpu")
    assert order == 3 * ["teacher", "left", "student", "left"]
    for name, value in (("linear_layers", 3), ("height", 50), ("width", 72), ("num_frames", 6)):
        with pytest.raises(SettingError, match=f"--{name.replace('_', '-')} {value} given"):
            whole_video.run(dataclasses.replace(config, **{name: value}))
