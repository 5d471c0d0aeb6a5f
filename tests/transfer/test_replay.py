"""Replaying a model's kernels changes nothing but the time that they take."""

import gc

import pytest
import torch
from linvideo_core.transfer.replay import replayed
from torch import Tensor

from linvideo_core.models.velocity import bind
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.training.trainer import TrainingConfig
from linvideo_core.transfer.student import Student, StudentConfig, accelerated
from tests.conftest import LATENT_SHAPE


def draw(batch_size: int, teacher: Teacher, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, *LATENT_SHAPE, generator=generator)
    sigma = torch.rand(batch_size, generator=generator)
    return latents.cuda(), sigma.cuda(), teacher.prompt_embeds[:batch_size]


def differentiate(student: Student, inputs: tuple[Tensor, ...], precision: str) -> list[Tensor]:
    latents, sigma, prompt_embeds = inputs
    velocity = bind(student.model, prompt_embeds, precision=precision)(latents, sigma)
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(velocity.square().mean(), parameters, allow_unused=True)
    return [velocity.detach().clone(), *(g.clone() for g in gradients if g is not None)]


def test_replay_on_a_cpu_is_refused_in_a_sentence(teacher: Teacher) -> None:
    with (
        pytest.raises(ValueError, match="--cuda-graphs was given on cpu"),
        replayed([teacher.model], tuple),
    ):
        pass
    assert "forward" not in vars(teacher.model)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replay_gives_the_values_and_gradients_of_the_same_kernels(
    teacher: Teacher, precision: str
) -> None:
    teacher = teacher.to("cuda")
    student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
    first, *rest = student.mixed.values()
    calls = [draw(size, teacher, seed) for seed, size in enumerate((2, 3, 2, 3))]
    for choice in (None, "linear"):
        first.choice = choice
        expected = [differentiate(student, call, precision) for call in calls]
        with replayed([student.model], student.choices):
            found = [differentiate(student, call, precision) for call in calls]
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5)
    assert rest


@pytest.mark.gpu
def test_compiled_blocks_are_replayed_with_the_same_values_and_gradients(teacher: Teacher) -> None:
    teacher = teacher.to("cuda")
    student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
    for module in student.mixed.values():
        module.mode = "linear"
    call = draw(2, teacher, 0)
    expected = differentiate(student, call, "bf16")
    settings = TrainingConfig(compile=True, cuda_graphs=True)
    with accelerated([student.model], student, settings):
        found = [differentiate(student, call, "bf16") for _ in range(2)]
    for mine in found:
        torch.testing.assert_close(mine, expected, rtol=0.05, atol=2e-3)


@pytest.mark.gpu
def test_a_choice_made_between_two_replays_is_seen(teacher: Teacher) -> None:
    teacher = teacher.to("cuda")
    student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
    latents, sigma, prompt_embeds = draw(2, teacher, 0)
    velocity = bind(student.model, prompt_embeds)
    with torch.no_grad(), replayed([student.model], student.choices):
        results = []
        for choice in ("softmax", "linear"):
            for module in student.mixed.values():
                module.harden(choice)
            results.append(velocity(latents, sigma))
    with torch.no_grad():
        torch.testing.assert_close(results[1], velocity(latents, sigma))
    assert not torch.allclose(results[0], results[1])


@pytest.mark.gpu
def test_no_graph_outlives_its_replay(teacher: Teacher) -> None:
    teacher = teacher.to("cuda")
    student = Student(teacher, StudentConfig(lora_rank=4), seed=0)

    def count_graphs() -> int:
        return sum(type(found) is torch.cuda.CUDAGraph for found in gc.get_objects())

    before = count_graphs()
    with replayed([student.model], student.choices):
        differentiate(student, draw(2, teacher, 0), "bf16")
        assert count_graphs() > before
    # Not the memory in use: cuBLAS keeps a workspace for each stream that was captured on.
    assert count_graphs() == before
