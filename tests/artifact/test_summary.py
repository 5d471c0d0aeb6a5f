"""What a file says of itself, in words and as a picture, and how a sampling differs from it."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from linvideo_core import artifact
from linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader, Usage
from linvideo_core.artifact.summary import (
    LayerTimes,
    count_bytes,
    describe,
    describe_times,
    draw_summary,
    find_differences,
    title,
)
from linvideo_core.demo import weights_path
from linvideo_core.flow import make_sigmas
from linvideo_core.teacher.config import TeacherConfig, TrajectoryConfig
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.teacher.trajectories import find_usage
from linvideo_core.transfer.preview import draw_preview

WAN = Usage(
    width=832, height=480, num_frames=81, guidance_scale=5.0, shift=3.0, steps=50, sampler="euler"
)
HIGH_NOISE = dataclasses.replace(WAN, sigma_from=1.0, sigma_to=0.875)
SIZES = dataclasses.replace(WAN, more_sizes=((480, 832, 81), (832, 480, 33)))
FEW_STEP = dataclasses.replace(WAN, guidance_scale=1.0, steps=4, sampler="lcm")
GRID = (1.0, 0.9, 0.75, 0.5, 0.0)
GRID_50 = tuple(make_sigmas(50, 3.0).tolist())


def header_of(num_layers: int = 10, **changes: Any) -> ArtifactHeader:
    """Return a header that makes every third layer linear."""
    layers = tuple(range(0, num_layers, 3))
    values = {
        "family": "wan",
        "fingerprint": f"wan, {num_layers} layers, 1 heads of 4",
        "weights_digest": "0123456789abcdef",
        "linear_layers": layers,
        "site_names": tuple(f"blocks.{layer}.self_attn" for layer in layers),
        "num_layers": num_layers,
        "feature_dim": 8,
        "parameters": "feature_maps",
        "objective": "adm",
        "steps": 12,
    }
    return ArtifactHeader(**(values | changes))


def make_artifact(num_layers: int = 10, **changes: Any) -> Artifact:
    header = header_of(num_layers, **changes)
    maps = torch.zeros(1, 4, 4)
    linear = {layer: {"query_map": maps, "key_map": maps} for layer in header.linear_layers}
    return Artifact(header=header, linear=linear)


def pixels(made: Artifact, note: str = "") -> np.ndarray:
    return np.asarray(draw_summary(made, note=note))


@pytest.mark.parametrize("num_layers", [1, 10, 30, 40, 61, 1000])
def test_a_file_of_any_depth_is_drawn(num_layers: int) -> None:
    picture = pixels(make_artifact(num_layers))
    assert picture.dtype == np.uint8 and picture.shape[1:] == (1024, 3)
    assert picture.min() < 60 and picture.max() == 255


def test_the_picture_shows_which_layers_are_linear_and_how_it_was_made() -> None:
    first = make_artifact()
    layers = {"linear_layers": (0, 3, 6, 8), "site_names": tuple("abcd")}
    for changes in (layers, {"steps": 13}, {"provenance": {"seed": 1}}, {"usage": WAN}):
        assert not np.array_equal(pixels(make_artifact(**changes)), pixels(first))
    assert len(pixels(first, "applied to a model")) > len(pixels(first))


def test_what_a_stranger_wrote_into_a_file_is_one_readable_line_each() -> None:
    strange = {"notes": "a\nb\x00\u202e" + "long " * 5000, "word": "x" * 5000}
    made = make_artifact(provenance=strange)
    facts = describe(made)
    assert all(text.isprintable() and len(text) <= 400 for text in facts.values())
    assert "notes a b long" in facts["made with"] and "word xxx" in facts["made with"]
    assert len(pixels(made)) < 2 * len(pixels(make_artifact()))


def test_the_words_name_the_sampling_grid_of_a_distilled_file() -> None:
    assert describe(make_artifact())["sampling"] == "any number of steps"
    distilled = make_artifact(sigmas=(1.0, 0.9375, 0.625, 0.0))
    assert describe(distilled)["sampling"] == "3 steps: sigmas 1, 0.9375, 0.625, 0"
    assert title(distilled.header) == "4 of 10 layers are linear"
    hybrid = dataclasses.replace(distilled.header, tile="1x0x4")
    assert title(hybrid) == "4 of 10 layers are hybrid"


def test_the_bytes_are_those_of_the_tensors() -> None:
    made = make_artifact()
    assert count_bytes(made) == {"feature maps": 4 * 2 * 16 * 4, "weight changes": 0}
    header = dataclasses.replace(made.header, parameters="lora", lora_rank=2)
    low_rank = {"blocks.0.ffn.0": (torch.zeros(2, 5), torch.zeros(7, 2))}
    changed = dataclasses.replace(made, header=header, low_rank=low_rank)
    assert count_bytes(changed)["weight changes"] == 24 * 4
    assert describe(changed)["weight changes"] == "LoRA of rank 2 on 1 weight"


def test_applying_showing_and_previewing_a_file_need_no_matplotlib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ["matplotlib", *filter(lambda name: name.startswith("matplotlib."), sys.modules)]:
        monkeypatch.setitem(sys.modules, name, None)
    made = artifact.load(weights_path("linearized.safetensors"))
    with artifact.apply(made, load_teacher(TeacherConfig()).model):
        widths = draw_summary(made).width, draw_preview([], {}, title="a", num_steps=1).width
    assert widths == (1024, 560)


@pytest.mark.parametrize("usage", [WAN, HIGH_NOISE, FEW_STEP, SIZES, Usage(width=832), Usage()])
def test_a_file_keeps_how_it_wants_to_be_used(usage: Usage, tmp_path: Path) -> None:
    made = make_artifact(usage=usage, weights_sketch=64 * (-0.12345,))
    artifact.save(made, tmp_path / "a.safetensors")
    assert artifact.load(tmp_path / "a.safetensors").header == made.header
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["linvideo.usage"])
    assert stored == json.loads(json.dumps(usage.said))


ABSURD = {
    "width": [0, 832.0],
    "height": [2**17],
    "num_frames": [True],
    "steps": [-1],
    "guidance_scale": ["5", float("nan")],
    "shift": [0, -3.0],
    "sampler": ["", "euler\n"],
    "sigma_from": [0.9],
    "sigma_to": [0.1],
    "more_sizes": [((832, 480),), ((832, 480, 0),), ((832, 480, "9"),), (832, 480, 9), "832x480"],
}


@pytest.mark.parametrize("field", ABSURD)
def test_absurd_usage_is_refused_by_name(field: str) -> None:
    for value in ABSURD[field]:
        with pytest.raises(ArtifactError, match="usage's (sigma|" + field + ")"):
            dataclasses.replace(WAN, **{field: value})
    for sizes in (5, [[832, 480]], [832], {"832": 480}):
        with pytest.raises(ArtifactError, match="usage's more_sizes"):
            Usage.parse({"more_sizes": sizes})
    with pytest.raises(ArtifactError, match="less than sigma_from"):
        Usage(sigma_from=0.5, sigma_to=0.5)


def test_the_file_says_in_words_how_it_wants_to_be_used() -> None:
    facts = describe(make_artifact(usage=HIGH_NOISE))
    assert facts["video"] == "832 x 480, 81 frames"
    several = describe(make_artifact(usage=SIZES))["video"]
    assert several == "832 x 480, 81 frames or 480 x 832, 81 frames or 832 x 480, 33 frames"
    assert facts["sampling"] == (
        "any number of steps; made at 50 steps of euler, guidance 5, shift 3, noise levels from 1 "
        "to 0.875"
    )
    few = describe(make_artifact(usage=FEW_STEP, sigmas=GRID))["sampling"]
    assert few.startswith("4 steps: sigmas 1, 0.9, 0.75, 0.5, 0; made at lcm, guidance 1")
    assert describe(make_artifact())["video"] == "not said"


def test_a_students_usage_is_how_its_teacher_was_sampled() -> None:
    teacher = load_teacher(TeacherConfig())
    demo = find_usage(teacher, TrajectoryConfig(guidance_scale=4.0, shift=5.0, sampler_steps=20))
    assert (demo.width, demo.height, demo.num_frames) == (32, 32, 28)
    assert (demo.guidance_scale, demo.shift, demo.steps) == (4.0, 5.0, 20)
    sizes = {(16, 21, 60, 104): (832, 480, 81), (48, 31, 44, 80): (1280, 704, 121)}
    for latent_shape, size in sizes.items():
        wan = dataclasses.replace(teacher, is_demo=False, latent_shape=latent_shape)
        usage = find_usage(wan, TrajectoryConfig())
        assert (usage.width, usage.height, usage.num_frames) == size
        more = dataclasses.replace(wan, more_shapes=tuple(sizes))
        assert find_usage(more, TrajectoryConfig()).more_sizes == tuple(sizes.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"width": 1280, "height": 720}, ["1280 x 720, 81 frames, but the file was made at 832"]),
        ({"num_frames": 33}, ["832 x 480, 33 frames, but the file was made at 832 x 480, 81"]),
        ({"guidance_scale": 6.0}, ["cfg 6, but the file was made at 5"]),
        ({"guidance_scale": 1.0}, ["no guidance (cfg 1), but the file was made at cfg 5"]),
        ({"shift": 8.0}, ["shift 8, but the file was made at 3"]),
        ({"shift": 3.001, "guidance_scale": 5.01}, []),
        ({"sampler": "uni_pc"}, []),
        ({"shift": None, "guidance_scale": None, "width": None}, []),
    ],
)
def test_what_differs_from_a_file_is_said(changes: dict[str, Any], said: list[str]) -> None:
    sampled = dataclasses.replace(WAN, **changes)
    found = find_differences(header_of(usage=WAN), sampled, GRID_50)
    assert len(found) == len(said)
    assert all(each.startswith(start) for each, start in zip(found, said, strict=True))
    assert find_differences(header_of(usage=Usage()), sampled, GRID_50) == []


@pytest.mark.parametrize(
    ("size", "num_said"),
    [
        ((832, 480, 81), 0),
        ((832, 480, 33), 0),
        ((480, 832, 81), 0),
        ((480, 832, 33), 1),
        ((832, 480, 49), 1),
    ],
)
def test_any_size_that_a_file_was_made_at_suits_it(
    size: tuple[int, int, int], num_said: int
) -> None:
    sampled = Usage(**dict(zip(("width", "height", "num_frames"), size, strict=True)))
    found = find_differences(header_of(usage=SIZES), sampled)
    assert len(found) == num_said
    assert all("made at 832 x 480, 81 frames or 480 x 832, 81" in each for each in found)


@pytest.mark.parametrize(
    ("sigmas", "said"),
    [
        (GRID_50, ""),
        (tuple(make_sigmas(20, 3.0).tolist()), ""),
        (tuple(make_sigmas(20, 3.0)[:8].tolist()), ""),
        (tuple(make_sigmas(4, 3.0).tolist()), "4 steps, but the file was made in 50"),
        (tuple(make_sigmas(4, 3.0)[2:].tolist()), "2 steps, but the file was made in 25"),
        ((), ""),
    ],
)
def test_few_steps_need_a_distilled_file(sigmas: tuple[float, ...], said: str) -> None:
    found = find_differences(header_of(usage=WAN), Usage(), sigmas)
    assert [each[: len(said)] for each in found] == ([said] if said else [])


@pytest.mark.parametrize(
    ("sigmas", "num_said"),
    [(GRID, 0), (GRID[:3], 0), (GRID[2:], 0), ((), 0), ((1.0, 0.8, 0.5, 0.0), 1), (GRID_50, 1)],
)
def test_a_distilled_file_is_bound_to_its_levels(sigmas: tuple[float, ...], num_said: int) -> None:
    header = header_of(usage=FEW_STEP, sigmas=GRID)
    found = find_differences(header, dataclasses.replace(FEW_STEP, steps=50), sigmas)
    assert len(found) == num_said
    assert all("4 steps that the file was distilled for" in each for each in found)


def test_a_distilled_file_wants_its_sampler_and_no_guidance() -> None:
    header = header_of(usage=FEW_STEP, sigmas=GRID)
    found = find_differences(header, WAN, GRID)
    assert found == [
        "cfg 5, but guidance is trained into the file: set cfg to 1",
        "sampler euler, but the file was distilled for lcm",
    ]


@pytest.mark.parametrize(
    ("usage", "sigmas", "num_outside"),
    [
        (HIGH_NOISE, GRID_50[:16], 0),
        (HIGH_NOISE, GRID_50, 32),
        (dataclasses.replace(WAN, sigma_from=0.875, sigma_to=0.0), GRID_50[15:], 0),
        (dataclasses.replace(WAN, sigma_from=0.875, sigma_to=0.0), GRID_50, 12),
    ],
)
def test_steps_beyond_an_experts_noise_levels_are_counted(
    usage: Usage, sigmas: tuple[float, ...], num_outside: int
) -> None:
    found = find_differences(header_of(usage=usage), WAN, sigmas)
    start = f"{num_outside} of {len(sigmas) - 1} steps at noise levels that the file was not made"
    assert [each[: len(start)] for each in found] == ([start] if num_outside else [])


@pytest.mark.parametrize(
    ("shape", "linear", "softmax", "said"),
    [
        (
            (2, 32760),
            LayerTimes("fused kernels", [0.9, 0.604, 0.5]),
            LayerTimes("PyTorch's cuDNN", [11.24]),
            "a linear layer takes 0.60 ms (fused kernels), a softmax layer 11.2 ms (PyTorch's "
            "cuDNN), at 2 x 32,760 tokens",
        ),
        (
            (448,),
            LayerTimes("plain PyTorch", [2.0]),
            LayerTimes("not measured", []),
            "a linear layer takes 2.00 ms (plain PyTorch) at 448 tokens",
        ),
    ],
    ids=["both", "linear alone"],
)
def test_times_of_layers_are_told(
    shape: tuple[int, ...], linear: LayerTimes, softmax: LayerTimes, said: str
) -> None:
    assert describe_times(shape, linear, softmax) == [said]
    told = describe_times(shape, linear, softmax, kind="hybrid")
    assert told == [said.replace("linear", "hybrid")]


def test_linear_layers_that_gain_nothing_are_told() -> None:
    linear, faster = LayerTimes("fused kernels", [2.0]), LayerTimes("softmax", [1.9])
    _, found = describe_times((1, 448), linear, faster)
    assert "gain nothing at so few tokens" in found
