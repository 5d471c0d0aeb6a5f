"""Few steps: DMD2's losses, what a generator is trained on, and when training ends early."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from linvideo_core import artifact
from linvideo_core.artifact import Artifact
from linvideo_core.distill import dmd2, pipeline
from linvideo_core.distill.config import DistillationConfig
from linvideo_core.distill.dmd2 import draw_exits, draw_rollouts, simulate_backward
from linvideo_core.distill.pipeline import TrainingMonitor
from linvideo_core.distill.task import DistillationTask, make_student, start_from
from linvideo_core.distill.teacher_statistics import Endpoints, TeacherStatistics
from linvideo_core.evaluate.compare import load_linearized
from linvideo_core.flow import add_noise, bind, make_sigmas, sample_few_step
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.context import Run
from linvideo_core.run.process_group import SINGLE_PROCESS, ProcessGroup
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer.student import Student
from tests.conftest import Recorder

STATISTICS = TeacherStatistics(spread=1.0, motion=1.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_push_is_the_normalised_difference_of_the_clean_estimates() -> None:
    x0, noise, real, fake = (draw(3, 2, 4, 5, 6, seed=i) for i in range(4))
    sigma = torch.tensor([0.1, 0.5, 0.9])
    noisy = add_noise(x0, noise, sigma)
    push = dmd2.distribution_push(x0, noisy, sigma, real, fake)
    for i in range(3):
        clean_real, clean_fake = (noisy[i] - sigma[i] * u[i] for u in (real, fake))
        expected = (clean_fake - clean_real) / (x0[i] - clean_real).abs().mean()
        torch.testing.assert_close(push[i], expected, rtol=1e-4, atol=1e-5)


def test_the_generators_gradient_is_the_push_and_vanishes_where_the_scores_agree() -> None:
    x0 = draw(3, 2, 4, 5, 6).requires_grad_()
    push = draw(3, 2, 4, 5, 6, seed=1)
    dmd2.generator_loss(x0, push).backward()
    torch.testing.assert_close(x0.grad, push / push.numel())
    velocity, sigma = draw(3, 2, 4, 5, 6, seed=2), torch.full((3,), 0.4)
    assert not dmd2.distribution_push(x0, x0.detach(), sigma, velocity, velocity).any()


def test_the_critic_learns_the_flow_of_the_generators_videos() -> None:
    x0, noise = draw(2, 3, seed=1).requires_grad_(), draw(2, 3, seed=2)
    assert dmd2.critic_loss(noise - x0, x0, noise) == 0
    fake = torch.zeros(2, 3, requires_grad=True)
    dmd2.critic_loss(fake, x0, noise).backward()
    assert x0.grad is None
    torch.testing.assert_close(fake.grad, -2 * (noise - x0.detach()) / 6)


def test_every_step_is_trained_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_samples in 8 * [4, 5, 9]:
        exits = draw_exits(num_samples, 4, generator)
        counts = exits.bincount(minlength=4)
        assert counts.max() - counts.min() <= 1 and bool((exits.diff() <= 0).all())


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_the_generator_is_trained_on_what_it_meets_in_sampling(exit_step: int) -> None:
    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(latents) + sigma.view(-1, 1, 1, 1, 1)

    noise, sigmas = draw(3, 2, 2, 4, 4), make_sigmas(4, 5.0)
    met: list[Tensor] = []

    def recording(latents: Tensor, sigma: Tensor) -> Tensor:
        met.append(latents.clone())
        return velocity(latents, sigma)

    sample_few_step(recording, noise, sigmas, generator=torch.Generator().manual_seed(7))
    generator, exits = torch.Generator().manual_seed(7), torch.full((3,), exit_step)
    (rollout,) = draw_rollouts(torch.zeros(3), exits, noise.shape[1:], generator)
    # The sampler is given its first noise; its generator draws what is added later.
    later = torch.Generator().manual_seed(7)
    fresh = [torch.randn(noise.shape, generator=later) for _ in rollout.fresh]
    rollout = dataclasses.replace(rollout, noise=noise, fresh=fresh)
    found = simulate_backward(lambda count: velocity, rollout, sigmas)
    torch.testing.assert_close(found, met[exit_step], rtol=0, atol=0)


@dataclasses.dataclass
class Rank(ProcessGroup):
    """One process of several, as far as it shares batches."""

    rank: int
    size: int


@pytest.mark.parametrize(("num_parts", "size"), [(1, 1), (3, 1), (6, 1), (3, 2)])
def test_a_batch_in_parts_is_the_whole_batch(num_parts: int, size: int) -> None:
    """Whoever computes it: all parts together hold every row once, and no step that none takes."""

    def rollouts(num_parts: int, processes: ProcessGroup) -> list[dmd2.Rollout]:
        exits = torch.tensor([3, 3, 2, 1, 0, 0])
        generator = torch.Generator().manual_seed(0)
        return draw_rollouts(torch.arange(6), exits, (1, 1, 2, 2), generator, num_parts, processes)

    (whole,) = rollouts(1, SINGLE_PROCESS)
    found = [rollouts(num_parts, Rank(rank, size)) for rank in range(size)]
    assert sorted(int(n) for own in found for part in own for n in part.prompt) == [*range(6)]
    for same_part in zip(*found, strict=True):
        longest = max(int(part.exits.max()) for part in same_part)
        for part in same_part:
            assert len(part.fresh) == longest
            for i, row in enumerate(part.prompt.tolist()):
                assert part.exits[i] == whole.exits[row]
                assert torch.equal(part.noise[i], whole.noise[row])
                for step in range(int(part.exits[i])):
                    assert torch.equal(part.fresh[step][i], whole.fresh[step][row])
            assert [len(fresh) for fresh in part.fresh] == [
                int((part.exits > step).sum()) for step in range(longest)
            ]


def test_motion_in_parts_has_the_gradient_of_the_whole() -> None:
    shares = torch.tensor([0.5, 0.8, 1.4], requires_grad=True)
    expected = shares.mean().log().square()
    (wanted,) = torch.autograd.grad(expected, shares)
    losses = torch.stack([dmd2.motion_loss(own, shares.detach().mean()) for own in shares])
    torch.testing.assert_close(losses.detach(), expected.detach().expand(3))
    torch.testing.assert_close(torch.autograd.grad(losses.mean(), shares)[0], wanted)


def feed(rows: list[dict[str, float]]) -> str | None:
    monitor = TrainingMonitor()
    faults = [monitor({"spread_ratio": 1.0, "motion_ratio": 1.0, **row}) for row in rows]
    return next((fault for fault in faults if fault), None)


def test_the_monitor_tells_spikes_and_collapses_from_noise() -> None:
    calm = [{"critic_loss": 1.0 + 0.1 * (i % 3)} for i in range(60)]
    assert feed(calm) is None
    assert feed([*calm, {"critic_loss": 50.0}, *calm]) is None, "a single outlier"
    assert "critic's loss rose" in feed([*calm, *[{"critic_loss": 50.0}] * 6])
    still = [{"critic_loss": 1.0, "motion_ratio": 0.3}] * 6
    assert "came to a halt" in feed([*calm, *still])
    alike = [{"critic_loss": 1.0, "spread_ratio": 0.2}] * 6
    assert "became alike" in feed([*calm, *alike])


def make_task(
    student: Student,
    teacher: Teacher,
    *,
    training: TrainingConfig | None = None,
    endpoints: Endpoints | None = None,
    **options: Any,
) -> DistillationTask:
    return DistillationTask(
        student, teacher, STATISTICS, DistillationConfig(lora_rank=4, num_steps=2, **options),
        training=training or TrainingConfig(batch_size=4), shift=3.0, run=Run(),
        endpoints=endpoints,
    )  # fmt: skip


def take_step(
    task: DistillationTask, step: int, accumulation: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """Run the passes of a step and their ways back; return the loss and the figures to log."""
    total, metrics = torch.zeros(()), {}
    for loss, figures in task.losses(step, torch.Generator().manual_seed(step), accumulation):
        loss.backward()
        total, metrics = total + loss.detach(), {**metrics, **figures}
    return total, metrics


def gradients_of(task: DistillationTask) -> dict[str, Tensor | None]:
    groups = task.parameter_groups()
    return {name: p.grad for group in groups for name, p in group.parameters.items()}


@pytest.mark.parametrize("kind", ["linearized", "hybrid"])
def test_a_student_starts_as_the_file_that_it_was_given(
    kind: str, teacher: Teacher, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(kind)
    student = make_student(teacher, made, DistillationConfig(lora_rank=4), seed=0)
    start_from(student, made)
    latents, sigma = draw(2, *teacher.latent_shape), torch.tensor([0.3, 0.8])
    prompts = teacher.prompt_embeds[:2]
    with torch.no_grad():
        found = bind(student.model, prompts)(latents, sigma)
        student.remove()
        with artifact.apply(made, teacher.model):
            expected = bind(teacher.model, prompts)(latents, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_teacher_student_and_critic_are_one_model_and_the_teacher_comes_out_clean(
    teacher: Teacher, linearized: Artifact
) -> None:
    latents, timesteps = draw(3, *teacher.latent_shape), torch.tensor([900.0, 500.0, 20.0])
    inputs = (latents, timesteps, teacher.prompt_embeds)
    names, expected = [n for n, _ in teacher.model.named_parameters()], teacher.model(*inputs)
    with make_student(teacher, linearized, DistillationConfig(lora_rank=4), seed=0) as student:
        start_from(student, linearized)
        task = make_task(student, teacher)
        assert task.models == [teacher.model]
        _, metrics = take_step(task, 0)
        assert {"critic_loss", "generator_loss", "motion_ratio", "spread_ratio"} <= metrics.keys()
        for weights in (student.weights, task.critic_weights):
            assert any(p.grad is not None and p.grad.any() for p in weights.values())
        trained = {id(p) for group in task.parameter_groups() for p in group.parameters.values()}
        with_gradient = {id(p) for p in teacher.model.parameters() if p.grad is not None}
        assert with_gradient <= trained
        # The critic starts as the teacher; the student does not.
        with student.disabled():
            assert torch.equal(teacher.model(*inputs), expected)
        assert not torch.equal(student.model(*inputs), expected)
        task.remove_critic()
    assert torch.equal(teacher.model(*inputs), expected)
    assert [n for n, _ in teacher.model.named_parameters()] == names


@pytest.mark.parametrize("train", ["lora", "full"])
def test_recomputed_activations_give_the_gradients_of_both_networks(
    train: str, teacher: Teacher, linearized: Artifact
) -> None:
    found = []
    for is_recomputed in (False, True):
        settings = DistillationConfig(lora_rank=4, num_steps=2, parameters=train)
        with make_student(teacher, linearized, settings, seed=0) as student:
            training = TrainingConfig(batch_size=4, activation_checkpointing=is_recomputed)
            task = make_task(student, teacher, training=training, parameters=train)
            take_step(task, 0)
            found.append(gradients_of(task))
            task.remove_critic()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.fixture
def endpoints(teacher: Teacher, tmp_path: Path) -> Endpoints:
    settings = TrajectoryConfig(num_trajectories=3, states_per_trajectory=2, sampler_steps=4)
    return Endpoints(collect(teacher, settings, Run(folder=tmp_path / "run")), 0.4)


def test_regression_joins_the_students_turn_and_no_other(
    teacher: Teacher, linearized: Artifact, endpoints: Endpoints
) -> None:
    found = {}
    for ends in (None, endpoints):
        with make_student(teacher, linearized, DistillationConfig(lora_rank=4), seed=0) as student:
            task = make_task(
                student, teacher, endpoints=ends, critic_steps=2, regression_weight=0.5
            )
            found[ends] = [(*take_step(task, step), gradients_of(task)) for step in (0, 1)]
            task.remove_critic()
    (loss, metrics, gradients), (plain, _, others) = found[endpoints][0], found[None][0]
    torch.testing.assert_close(loss, plain + 0.5 * metrics["regression_loss"])
    assert any(not torch.equal(g, others[name]) for name, g in gradients.items() if g is not None)
    assert "regression_loss" not in found[endpoints][1][1]
    torch.testing.assert_close(found[endpoints][1][0], found[None][1][0], rtol=0, atol=0)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_has_the_losses_gradients_and_statistics_of_one_pass(
    num_parts: int, step: int, teacher: Teacher, linearized: Artifact, endpoints: Endpoints
) -> None:
    """At a student's turn and at one of the critic alone, with all losses there are."""
    found = []
    weights = {"critic_steps": 2, "regression_weight": 0.7, "motion_weight": 0.3}
    for accumulation in (1, num_parts):
        with make_student(teacher, linearized, DistillationConfig(lora_rank=4), seed=0) as student:
            start_from(student, linearized)
            training = TrainingConfig(batch_size=4 // accumulation, accumulation=accumulation)
            task = make_task(student, teacher, training=training, endpoints=endpoints, **weights)
            loss, metrics = take_step(task, step, accumulation)
            found.append({"loss": loss, **metrics, **gradients_of(task)})
            task.remove_critic()
    whole, parts = found
    assert {"critic_loss", "spread_ratio", "motion_ratio"} <= whole.keys() == parts.keys()
    assert ("generator_loss" in whole) == ("motion_loss" in whole) == (step == 0)
    for name, expected in whole.items():
        if expected is None:
            assert parts[name] is None, name
        else:
            torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def run(
    teacher: Teacher, first: Artifact, out: Path, callbacks: Callbacks | None = None
) -> Artifact:
    config = pipeline.DistillConfig(
        trajectories=TrajectoryConfig(
            num_trajectories=3, states_per_trajectory=2, sampler_steps=4, shard_size=3
        ),
        distillation=DistillationConfig(
            num_steps=2, lora_rank=4, critic_steps=2, regression_weight=0.5
        ),
        training=TrainingConfig(steps=6, batch_size=4, checkpoint_every=2, log_every=1),
    )
    where = Run(folder=out, callbacks=callbacks or Callbacks())
    with make_student(teacher, first, config.distillation, seed=0) as student:
        pipeline.distill(student, teacher, first, config, where)
    return artifact.load(out / pipeline.ARTIFACT_NAME)


def test_a_distillation_stopped_anywhere_ends_as_an_unbroken_one_and_names_its_steps(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    whole = run(teacher, linearized, tmp_path / "whole")
    assert whole.header.sigmas == pytest.approx(make_sigmas(2, 3.0).tolist())
    assert list(whole.header.linear_layers) == [0, 2] and whole.header.objective == "dmd2"
    assert whole.header.provenance["transfer objective"] == "adm"
    usage = whole.header.usage
    assert (usage.guidance_scale, usage.shift, usage.steps, usage.sampler) == (1, 3, 2, "lcm")
    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(teacher, linearized, tmp_path / f"at{at}", Recorder(stop_at=("distillation", at)))
        resumed = run(teacher, linearized, tmp_path / f"at{at}")
        files = [tmp_path / name / pipeline.ARTIFACT_NAME for name in ("whole", f"at{at}")]
        expected, found = (load_file(path) for path in files)
        assert (
            expected.keys() == found.keys()
            and resumed.header.linear_layers == whole.header.linear_layers
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_distilled_file_is_not_distilled_again(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    run(teacher, linearized, tmp_path)
    with pytest.raises(ValueError, match="is distilled already; give the file that `transfer`"):
        load_linearized(tmp_path / pipeline.ARTIFACT_NAME)
