"""The files that ship with the pack do what the README says of them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from linvideo_core import artifact
from linvideo_core.demo import weights_path
from linvideo_core.demo.classifier import load_judge
from linvideo_core.evaluate.compare import (
    CompareConfig,
    compare_artifact,
    load_distilled,
    load_linearized,
)
from linvideo_core.evaluate.sampler import draw_noise, draw_prompts, read_labels
from linvideo_core.flow import bind, sample_few_step
from linvideo_core.run.errors import SettingError
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher
from research.demo_model.sampling import measure_clips

PATH, FEW_STEP_PATH = (weights_path(f"{name}.safetensors") for name in ("linearized", "distilled"))


@pytest.fixture(scope="module")
def shipped() -> artifact.Artifact:
    """What `evaluate` takes by default."""
    return load_linearized(None)


def test_the_shipped_few_step_file_draws_what_was_asked_in_four_calls_without_guidance(
    shipped: artifact.Artifact,
) -> None:
    made = load_distilled([FEW_STEP_PATH], shipped)["distilled_4"]
    assert len(made.header.sigmas) == 5
    teacher = load_teacher(TeacherConfig())
    picks = draw_prompts(len(teacher.prompts), 8, seed=3)
    digits, directions = read_labels([teacher.prompts[i] for i in picks])
    with artifact.apply(made, teacher.model) as model, torch.no_grad():
        latents = sample_few_step(
            bind(model, teacher.prompt_embeds[picks]),
            draw_noise(teacher.latent_shape, 8, seed=3),
            torch.tensor(made.header.sigmas),
            generator=torch.Generator().manual_seed(4),
        )
    found = measure_clips(load_judge(), teacher.decode(latents), digits, directions)
    assert found["digit_accuracy"] >= 7 / 8 and found["motion_accuracy"] >= 7 / 8


def test_a_distilled_file_is_compared_with_the_file_that_it_was_made_from(
    shipped: artifact.Artifact,
) -> None:
    header, linear = shipped.header, shipped.linear
    few, names = header.linear_layers[:2], header.site_names[:2]
    mass = {"mass_bias": torch.zeros(1), "mass_gate": torch.zeros(1, 128)}
    for changes, tensors, words in (
        ({"linear_layers": few, "site_names": names}, {i: linear[i] for i in few}, "linear layers"),
        ({"tile": "1x4x4"}, {i: {**x, **mass} for i, x in linear.items()}, "hybrid layers"),
    ):
        other = dataclasses.replace(
            shipped, header=dataclasses.replace(header, **changes), linear=tensors
        )
        with pytest.raises(SettingError, match=f"the linearized file the {words} 1, 3.*give the"):
            load_distilled([FEW_STEP_PATH], other)


def test_the_shipped_file_makes_half_of_the_layers_linear(shipped: artifact.Artifact) -> None:
    assert 2 * len(shipped.header.linear_layers) >= shipped.header.num_layers == 10


@pytest.mark.parametrize("path", [PATH, FEW_STEP_PATH], ids=lambda path: path.stem)
def test_the_shipped_files_were_made_from_the_shipped_model(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_teacher(TeacherConfig()).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with artifact.apply(artifact.load(path), model):
        assert not caplog.records
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_shipped_student_is_far_closer_to_its_teacher_than_swapped_layers(
    shipped: artifact.Artifact,
) -> None:
    teacher = load_teacher(TeacherConfig())
    settings = CompareConfig(num_samples=2, sampler_steps=4, batch_size=2)
    _, swapped, student = compare_artifact(teacher, shipped, settings, seed=3).rows
    assert student["velocity_error"] < swapped["velocity_error"] / 2
    assert student["distance_to_teacher"] < swapped["distance_to_teacher"]
