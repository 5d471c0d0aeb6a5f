"""Losses of research: each is its formula, and its gradient is the one that it is meant to have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linvideo_core.distill.config import DistillationConfig
from linvideo_core.distill.teacher_statistics import Endpoints, measure_statistics
from linvideo_core.flow import velocity_to_x0
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.pool import TrajectoryPool
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer.config import ObjectiveConfig, SelectionConfig, StudentConfig
from linvideo_core.transfer.layer_selection import RANKING_NAME
from linvideo_core.transfer.objective import Batch
from linvideo_core.transfer.student import Student, TransferTask
from research.crowd import tasks

TINY = WanConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=32, text_dim=8, freq_dim=16)
SHAPE = (16, 2, 4, 4)
SAMPLER = TrajectoryConfig(
    num_trajectories=3, states_per_trajectory=3, sampler_steps=3, guidance_scale=3.0, shift=3.0
)
TRAINING = TrainingConfig(steps=2, batch_size=3)


@pytest.fixture
def teacher() -> Teacher:
    """Return a tiny teacher with random weights."""
    torch.manual_seed(0)
    model = WanModel(TINY)
    model.init_weights()
    with torch.no_grad():
        # Its last layer starts at zero.
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Teacher(
        name="tiny",
        model=model.requires_grad_(False),
        prompts=["a", "b"],
        prompt_embeds=torch.randn(2, 5, 8),
        negative_embeds=torch.randn(5, 8),
        latent_shape=SHAPE,
        decode=lambda latents: latents[:, 0],
        is_demo=False,
    )


@pytest.fixture
def student(teacher: Teacher) -> Iterator[Student]:
    """Return a student, all of whose layers are linear, with changes that are not zero."""
    with Student(teacher, StudentConfig(lora_rank=2), seed=0) as made:
        made.harden([0, 1])
        for name, weight in made.weights.items():
            if name.endswith("up"):
                torch.nn.init.normal_(weight, std=0.05)
        yield made


def make_task(
    kind: type[TransferTask], student: Student, teacher: Teacher, **objective: Any
) -> TransferTask:
    """Return a task that learns from a pool."""
    run = Run()
    pool = TrajectoryPool(teacher, SAMPLER, 3, 3, run, student.disabled)
    pool.fill()
    return kind(
        student,
        teacher,
        pool,
        selection=SelectionConfig(target=2),
        objective=ObjectiveConfig(levels="even", **objective),
        training=TRAINING,
        run=run,
        linear_layers=[0, 1],
    )


def draw(task: TransferTask) -> tuple[Batch, Tensor]:
    """Return a batch of a task, and its noise levels."""
    batch = task.batches.draw(torch.Generator().manual_seed(1), task.guided)
    return batch, task.trajectories.sigmas[batch.step]


def gradient_of(loss: Tensor, student: Student) -> Tensor:
    """Return the gradient of a loss to all of a student's weights and maps, as one vector."""
    maps = [
        parameter for mixed in student.mixed.values() for parameter in mixed.linear.parameters()
    ]
    found = torch.autograd.grad(loss, [*student.weights.values(), *maps], retain_graph=True)
    return torch.cat([each.flatten() for each in found])


def outputs_of(model: WanModel, latents: Tensor, sigma: Tensor, embeds: Tensor) -> list[Tensor]:
    """Return what each block makes, and the velocity."""
    found, hooks = [], []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda _, args, output: found.append(output)))
    velocity = model(latents, 1000 * sigma, embeds)
    for hook in hooks:
        hook.remove()
    return [*found, velocity]


def test_block_features_are_relative_errors_of_every_block(
    student: Student, teacher: Teacher
) -> None:
    task = make_task(tasks.BlockFeatures, student, teacher, anchor_share=1.0)
    batch, sigma = draw(task)
    args = batch.latents, sigma, batch.branch_embeds
    with student.disabled(), torch.no_grad():
        *theirs, target = outputs_of(teacher.model, *args)
    *own, velocity = outputs_of(student.model, *args)
    errors = [(a - b).square().sum() / b.square().sum() for a, b in zip(own, theirs, strict=True)]
    expected = (velocity - target).square().mean() + sum(errors) / 2
    loss = task.objective_loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    gradients = (gradient_of(each, student) for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert errors[0] > 0


def test_guided_velocity_is_matched_by_a_call_with_the_prompt(
    student: Student, teacher: Teacher
) -> None:
    task = make_task(tasks.GuidedVelocity, student, teacher, anchor_share=1.0, prompt_dropout=0.0)
    batch, sigma = draw(task)
    with student.disabled(), torch.no_grad():
        conditional = teacher.model(batch.latents, 1000 * sigma, batch.prompt_embeds)
        unconditional = teacher.model(batch.latents, 1000 * sigma, batch.negative_embeds)
    target = unconditional + 3 * (conditional - unconditional)
    velocity = student.model(batch.latents, 1000 * sigma, batch.prompt_embeds)
    expected = (velocity - target).square().mean()
    loss = task.objective_loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    gradients = (gradient_of(each, student) for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_guided_velocity_refuses_rows_without_a_prompt(student: Student, teacher: Teacher) -> None:
    task = make_task(tasks.GuidedVelocity, student, teacher, anchor_share=1.0)
    with pytest.raises(ValueError, match=r"prompt_dropout 0.3 given; 0 is needed"):
        task.objective_loss(draw(task)[0])


def test_the_kl_push_acts_through_the_step_that_leads_there(
    student: Student, teacher: Teacher
) -> None:
    task = make_task(tasks.KLPush, student, teacher, anchor_share=0.0)
    batch, sigma = draw(task)
    end = task.trajectories.sigmas[batch.step + 1]

    def guided(model: WanModel, latents: Tensor, level: Tensor) -> Tensor:
        conditional = model(latents, 1000 * level, batch.prompt_embeds)
        unconditional = model(latents, 1000 * level, batch.negative_embeds)
        return unconditional + 3 * (conditional - unconditional)

    step = (end - sigma).view(-1, 1, 1, 1, 1)
    latents = batch.latents + step * guided(student.model, batch.latents, sigma)
    with torch.no_grad():
        fake = guided(student.model, latents, end)
        with student.disabled():
            real = guided(teacher.model, latents, end)
        clean = [velocity_to_x0(latents, velocity, end) for velocity in (fake, real)]
        distance = (clean[0] - clean[1]).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        push = (clean[0] - clean[1]) / distance.clamp_min(1e-6)
    velocity = student.model(batch.latents, 1000 * sigma, batch.branch_embeds)
    error = (velocity - batch.velocity).square().mean()
    loss = task.objective_loss(batch)
    torch.testing.assert_close(loss, error + push.square().mean() / 2, rtol=1e-3, atol=1e-5)
    expected = gradient_of(error + (latents * push).mean(), student)
    torch.testing.assert_close(gradient_of(loss, student), expected, rtol=2e-3, atol=1e-5)
    # At noise level 0 there is nothing to push with.
    is_end = end == 0
    assert not push[is_end].any() and push[~is_end].abs().sum() > 0


@pytest.mark.parametrize("kind", [tasks.BlockFeatures, tasks.GuidedVelocity, tasks.KLPush])
def test_states_that_the_student_moves_first_are_refused(
    kind: type[TransferTask], student: Student, teacher: Teacher, tmp_path: Path
) -> None:
    with student.disabled():
        stored = collect(teacher, SAMPLER, Run(folder=tmp_path / "run"))
    task = kind(
        student,
        teacher,
        stored,
        selection=SelectionConfig(target=2),
        objective=ObjectiveConfig(objective="adm", levels="even", anchor_share=0.0),
        training=TRAINING,
        run=Run(),
        linear_layers=[0, 1],
    )
    with pytest.raises(ValueError, match="states of a pool, or objective velocity, are needed"):
        task.objective_loss(task.batches.draw(torch.Generator().manual_seed(0), task.guided))


@pytest.mark.parametrize(("num_layers", "target"), [(12, 6), (40, 22), (10, 3), (2, 1)])
def test_scores_from_a_ranking_follow_it_and_meet_the_budget(num_layers: int, target: int) -> None:
    order = torch.randperm(num_layers, generator=torch.Generator().manual_seed(0)).tolist()
    starts = tasks.start_scores(order, target)
    scores = [starts[layer] for layer in order]
    assert scores == sorted(set(scores)) and sum(1 - r for r in scores) == pytest.approx(target)
    assert scores[0] >= 0.1 - 1e-6 and scores[-1] <= 0.9 + 1e-6 and scores[-1] - scores[0] <= 0.501
    # Whose mean leaves no room start alike.
    assert set(tasks.start_scores(order, num_layers).values()) == {0.0}


def test_layers_are_learned_from_the_ranking_that_is_measured(
    teacher: Teacher, tmp_path: Path
) -> None:
    run = Run(folder=tmp_path / "run")
    with Student(teacher, StudentConfig(lora_rank=2), seed=0) as student:
        with student.disabled():
            stored = collect(teacher, SAMPLER, run)
        task = tasks.FromRanking(
            student,
            teacher,
            stored,
            selection=SelectionConfig(target=1),
            objective=ObjectiveConfig(objective="velocity", levels="even"),
            training=TRAINING,
            run=run,
        )
        ranking = json.loads((run.folder / RANKING_NAME).read_text())["ranking"]
        scores = dict(zip(student.mixed, task.selection.layer_scores().tolist(), strict=True))
        assert scores == pytest.approx({ranking[0]: 0.25, ranking[1]: 0.75})
        assert task.selection.is_learned and task.selection.linear_layers is None


def test_regression_leads_states_to_their_own_videos_at_every_step(
    student: Student, teacher: Teacher, tmp_path: Path
) -> None:
    with student.disabled():
        stored = collect(teacher, SAMPLER, Run(folder=tmp_path / "run"))
    task = tasks.Regression(
        student,
        teacher,
        measure_statistics(stored),
        DistillationConfig(num_steps=2, critic_steps=3),
        training=TRAINING,
        shift=3.0,
        run=Run(),
        endpoints=Endpoints(stored, 0.0),
    )
    assert {group.every for group in task.parameter_groups()} == {1}
    assert {group.network for group in task.parameter_groups()} == {"generator"}
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    [(loss, figures)] = task.losses(1, next(generators), 1)
    states, sigma, ending = task.endpoints.take(task.endpoints.pick(3, next(generators)), "cpu")
    velocity = student.model(states.latents, 1000 * sigma, teacher.prompt_embeds[states.prompt])
    x0 = states.latents - sigma.view(-1, 1, 1, 1, 1) * velocity
    expected = (x0 - ending).abs().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    gradients = (gradient_of(each, student) for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert figures["regression_loss"] == loss
    task.remove_critic()
