"""The files that ship with the pack do what the README says of them."""

import pytest
import torch

from linvideo_core import artifact
from linvideo_core.comparison import CompareConfig, compare_artifact
from linvideo_core.demo import weights_path
from linvideo_core.subject import SubjectConfig, load_subject

PATH = weights_path("linearized.safetensors")


@pytest.fixture(scope="module")
def shipped() -> artifact.Artifact:
    return artifact.load(PATH)


def test_the_shipped_file_is_small_and_makes_half_of_the_layers_linear(
    shipped: artifact.Artifact,
) -> None:
    assert PATH.stat().st_size <= 4_000_000
    assert 2 * len(shipped.header.layers) >= shipped.header.num_layers == 10


def test_the_shipped_file_was_made_from_the_shipped_model(
    shipped: artifact.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_subject(SubjectConfig()).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    artifact.apply(shipped, model).remove()
    assert not caplog.records
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_shipped_student_is_far_closer_to_its_teacher_than_swapped_layers(
    shipped: artifact.Artifact,
) -> None:
    subject = load_subject(SubjectConfig())
    settings = CompareConfig(num_samples=3, steps=8, batch_size=3)
    _, swapped, student = compare_artifact(subject, shipped, settings, seed=3).rows
    assert student["velocity_error"] < swapped["velocity_error"] / 2
    assert student["distance_to_teacher"] < swapped["distance_to_teacher"]
