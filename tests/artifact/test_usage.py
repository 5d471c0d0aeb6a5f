import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from linvideo_core import artifact
from linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader, Usage
from linvideo_core.artifact.picture import draw_summary
from linvideo_core.artifact.summary import describe, find_differences
from linvideo_core.flow import make_sigmas
from linvideo_core.teacher.config import TeacherConfig, TrajectoryConfig
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.teacher.trajectories import find_usage

WAN = Usage(
    width=832,
    height=480,
    num_frames=81,
    guidance_scale=5.0,
    shift=3.0,
    steps=50,
    sampler="euler",
)
HIGH_NOISE = dataclasses.replace(WAN, sigma_from=1.0, sigma_to=0.875)
FEW_STEP = dataclasses.replace(WAN, guidance_scale=1.0, steps=4, sampler="lcm")
GRID = (1.0, 0.9, 0.75, 0.5, 0.0)


def header_of(usage: Usage, **changes: Any) -> ArtifactHeader:
    return ArtifactHeader(
        **{
            "family": "wan",
            "fingerprint": "wan, 3 layers, 2 heads of 128",
            "weights_digest": "0123456789abcdef",
            "linear_layers": (0,),
            "site_names": ("blocks.0.self_attn",),
            "num_layers": 3,
            "feature_dim": 6,
            "parameters": "feature_maps",
            "objective": "adm",
            "steps": 5,
            "usage": usage,
            **changes,
        }
    )


def artifact_of(header: ArtifactHeader) -> Artifact:
    sizes = {"N": 2, "D": 4}
    shapes = header.tensor_shapes().items()
    tensors = {name: torch.ones([sizes.get(n, n) for n in shape]) for name, shape in shapes}
    return Artifact(header=header, linear={0: tensors})


@pytest.mark.parametrize("usage", [WAN, HIGH_NOISE, FEW_STEP, Usage(width=832), Usage()])
def test_a_file_keeps_how_it_wants_to_be_used(usage: Usage, tmp_path: Path) -> None:
    header = header_of(usage, weights_sketch=64 * (-0.12345,))
    artifact.save(artifact_of(header), tmp_path / "a.safetensors")
    assert artifact.load(tmp_path / "a.safetensors").header == header
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["linvideo.usage"])
    assert stored == usage.said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("width", 832.0),
        ("height", 2**17),
        ("num_frames", True),
        ("steps", -1),
        ("guidance_scale", "5"),
        ("guidance_scale", float("nan")),
        ("shift", 0),
        ("shift", -3.0),
        ("sampler", ""),
        ("sampler", "euler\n"),
        ("sigma_from", 0.9),
        ("sigma_to", 0.1),
    ],
)
def test_absurd_usage_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="usage's (sigma|" + field + ")"):
        dataclasses.replace(WAN, **{field: value})


def test_a_range_of_noise_levels_falls() -> None:
    with pytest.raises(ArtifactError, match="less than sigma_from"):
        Usage(sigma_from=0.5, sigma_to=0.5)


def test_the_file_says_it_in_words_and_in_its_picture() -> None:
    facts = describe(artifact_of(header_of(HIGH_NOISE)))
    assert facts["video"] == "832 x 480, 81 frames"
    assert facts["sampling"] == (
        "any number of steps; made at 50 steps of euler, guidance 5, shift 3, noise levels from 1 "
        "to 0.875"
    )
    few = describe(artifact_of(header_of(FEW_STEP, sigmas=GRID)))["sampling"]
    assert few.startswith("4 steps: sigmas 1, 0.9, 0.75, 0.5, 0; made at lcm, guidance 1")
    assert describe(artifact_of(header_of(Usage())))["video"] == "not said"
    pictures = [draw_summary(artifact_of(header_of(usage))) for usage in (WAN, HIGH_NOISE)]
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.parametrize(
    ("latent_shape", "size"),
    [
        ((16, 21, 60, 104), (832, 480, 81)),
        ((48, 31, 44, 80), (1280, 704, 121)),
    ],
)
def test_a_students_usage_is_how_its_teacher_was_sampled(
    latent_shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    teacher = load_teacher(TeacherConfig())
    demo = find_usage(teacher, TrajectoryConfig(guidance_scale=4.0, shift=5.0, sampler_steps=20))
    assert (demo.width, demo.height, demo.num_frames) == (32, 32, 28)
    assert (demo.guidance_scale, demo.shift, demo.steps) == (4.0, 5.0, 20)
    wan = dataclasses.replace(teacher, is_demo=False, latent_shape=latent_shape)
    usage = find_usage(wan, TrajectoryConfig())
    assert (usage.width, usage.height, usage.num_frames) == size


GRID_50 = tuple(make_sigmas(50, 3.0).tolist())


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
    found = find_differences(header_of(WAN), sampled, GRID_50)
    assert len(found) == len(said)
    assert all(each.startswith(start) for each, start in zip(found, said, strict=True))
    assert find_differences(header_of(Usage()), sampled, GRID_50) == []


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
    found = find_differences(header_of(WAN), Usage(), sigmas)
    assert [each[: len(said)] for each in found] == ([said] if said else [])


@pytest.mark.parametrize(
    ("sigmas", "num_said"),
    [(GRID, 0), (GRID[:3], 0), (GRID[2:], 0), ((), 0), ((1.0, 0.8, 0.5, 0.0), 1), (GRID_50, 1)],
)
def test_a_distilled_file_is_bound_to_its_levels(sigmas: tuple[float, ...], num_said: int) -> None:
    header = header_of(FEW_STEP, sigmas=GRID)
    found = find_differences(header, dataclasses.replace(FEW_STEP, steps=50), sigmas)
    assert len(found) == num_said
    assert all("4 steps that the file was distilled for" in each for each in found)


def test_a_distilled_file_wants_its_sampler_and_no_guidance() -> None:
    header = header_of(FEW_STEP, sigmas=GRID)
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
    found = find_differences(header_of(usage), WAN, sigmas)
    start = f"{num_outside} of {len(sigmas) - 1} steps at noise levels that the file was not made"
    assert [each[: len(start)] for each in found] == ([start] if num_outside else [])
