"""Few steps: DMD2's losses, what a generator is trained on, and when training ends early."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.artifact import Artifact
from linvideo_core.distill import cli as distill
from linvideo_core.distill.monitor import TrainingMonitor
from linvideo_core.distill.rollout import draw_exits, simulate_backward
from linvideo_core.distill.task import (
    DistillationConfig,
    DistillationTask,
    make_student,
    start_from,
)
from linvideo_core.distill.teacher_statistics import Endpoints, TeacherStatistics
from linvideo_core.evaluate.entrants import load_linearized
from linvideo_core.flow import add_noise, make_sigmas, sample_few_step, velocity_to_x0
from linvideo_core.models.velocity import bind
from linvideo_core.run.progress import silent
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import TrajectoryConfig, collect
from linvideo_core.training.trainer import ParameterGroup, TrainingConfig, fit
from linvideo_core.transfer.objectives import dmd2
from linvideo_core.transfer.student import Student

LIKENESS = TeacherStatistics(spread=1.0, motion=1.0)


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


@pytest.mark.parametrize("num_samples", [4, 5, 9])
def test_every_step_is_trained_alike(num_samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        exits = draw_exits(num_samples, 4, generator)
        counts = exits.bincount(minlength=4)
        assert counts.max() - counts.min() <= 1
        assert bool((exits.diff() <= 0).all())


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
    found = simulate_backward(
        lambda count: velocity,
        noise,
        sigmas,
        torch.full((3,), exit_step),
        generator=torch.Generator().manual_seed(7),
    )
    torch.testing.assert_close(found, met[exit_step], rtol=0, atol=0)


def feed(rows: list[dict[str, float]]) -> str | None:
    health = TrainingMonitor()
    faults = [health({"spread_ratio": 1.0, "motion_ratio": 1.0, **row}) for row in rows]
    return next((fault for fault in faults if fault), None)


def test_health_tells_spikes_and_collapses_from_noise() -> None:
    calm = [{"critic_loss": 1.0 + 0.1 * (i % 3)} for i in range(60)]
    assert feed(calm) is None
    assert feed([*calm, {"critic_loss": 50.0}, *calm]) is None, "a single outlier"
    assert "critic's loss rose" in feed([*calm, *[{"critic_loss": 50.0}] * 6])
    still = [{"critic_loss": 1.0, "motion_ratio": 0.3}] * 6
    assert "came to a halt" in feed([*calm, *still])
    alike = [{"critic_loss": 1.0, "spread_ratio": 0.2}] * 6
    assert "became alike" in feed([*calm, *alike])


class Player:
    """Two numbers that both want to be 1; the second has its turn at every third step."""

    def __init__(self) -> None:
        self.first, self.second = (nn.Parameter(torch.zeros(2)) for _ in range(2))

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup({"first": self.first}, 0.1, player="critic"),
            ParameterGroup({"second": self.second}, 0.1, every=3, player="generator"),
        ]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        loss = (self.first - 1).square().sum()
        return (loss if step % 3 else loss + 100 * (self.second - 1).square().sum()), {}

    def after_step(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def settings(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, checkpoint_every=2, log_every=1, warmup_steps=0)


def test_players_move_in_their_turns_and_are_clipped_apart(tmp_path: Path) -> None:
    task = Player()
    moved: list[tuple[bool, bool]] = []
    before = [task.first.clone(), task.second.clone()]

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        now = [task.first.detach().clone(), task.second.detach().clone()]
        if done:
            moved.append(tuple(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        before[:] = now

    fit(task, settings(4), tmp_path, seed=0, progress=progress)
    assert moved == [(True, True), (True, False), (True, False), (True, True)]
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert "critic_gradient_norm" in rows and "generator_gradient_norm" in rows


class Finder:
    """Finds a fault in the row of step `at`, or nothing."""

    def __init__(self, at: int, delay: int) -> None:
        self.at = at
        self.delay = delay
        self.num_seen = 0

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        self.num_seen += 1
        return "the videos became alike" if self.num_seen == self.at + 1 else None


@pytest.mark.parametrize(
    ("at", "delay", "kept"), [(6, 1, 4), (6, 2, 4), (6, 3, 2), (7, 1, 6), (7, 2, 4), (7, 5, 2)]
)
def test_a_fault_ends_training_at_the_last_checkpoint_from_before_it(
    at: int, delay: int, kept: int, tmp_path: Path
) -> None:
    """A checkpoint follows every second step; the fault began `delay - 1` rows earlier."""
    with pytest.raises(ValueError, match=f"the videos became alike at step {at}; the last good"):
        fit(Player(), settings(9), tmp_path, seed=0, monitor=Finder(at, delay))
    found = load_file(tmp_path / "checkpoint.safetensors")
    with pytest.raises(Stop):
        fit(Player(), settings(9), tmp_path / "other", seed=0, progress=stopper(kept))
    stopped = load_file(tmp_path / "other" / "checkpoint.safetensors")
    assert found.keys() == stopped.keys()
    for name in found:
        torch.testing.assert_close(found[name], stopped[name], rtol=0, atol=0)


def test_a_fault_from_the_start_leaves_no_checkpoint_and_a_whole_run_leaves_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="no good checkpoint is there"):
        fit(Player(), settings(9), tmp_path, seed=0, monitor=Finder(5, 6))
    assert not list(tmp_path.glob("*.safetensors"))
    fit(Player(), settings(9), tmp_path, seed=0, monitor=Finder(10, 2))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["checkpoint.safetensors"]


class Stop(BaseException):
    """Interrupts a run."""


def stopper(at: int) -> Callable[..., None]:
    """Return a progress that stops training after `at` steps; `fit` is expected to be let go."""

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        if stage == "training" and done == at:
            raise Stop

    return progress


def make_task(
    student: Student, teacher: Teacher, *, endings: Endpoints | None = None, **options: Any
) -> DistillationTask:
    return DistillationTask(
        student, teacher, LIKENESS, DistillationConfig(rank=4, num_steps=2, **options),
        training=TrainingConfig(batch_size=4), shift=3.0, precision="fp32", seed=0,
        endings=endings,
    )  # fmt: skip


def test_a_student_starts_as_the_file_that_it_was_given(
    teacher: Teacher, linearized: Artifact
) -> None:
    student = make_student(teacher, linearized, DistillationConfig(rank=4), seed=0)
    start_from(student, linearized)
    latents, sigma = draw(2, *teacher.latent_shape), torch.tensor([0.3, 0.8])
    prompts = teacher.prompt_embeds[:2]
    with torch.no_grad():
        found = bind(student.model, prompts)(latents, sigma)
        with artifact.transfer_into(teacher.model, linearized) as model:
            expected = bind(model, prompts)(latents, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_three_roles_stand_on_one_copy_of_the_weights(
    teacher: Teacher, linearized: Artifact
) -> None:
    student = make_student(teacher, linearized, DistillationConfig(rank=4), seed=0)
    task = make_task(student, teacher)
    frozen = {p.data_ptr() for p in teacher.model.parameters()}
    for model in (student.model, task.critic):
        mine = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        assert mine <= frozen and len(mine) > 10
    loss, metrics = task.loss(0, torch.Generator().manual_seed(0))
    loss.backward()
    assert {"critic_loss", "generator_loss", "motion_ratio", "spread_ratio"} <= metrics.keys()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.weights.values())
    assert any(p.grad is not None and p.grad.any() for p in task.critic_weights.values())


def test_regression_joins_the_students_turn_and_no_other(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    settings = TrajectoryConfig(num_trajectories=3, states_per_trajectory=2, sampler_steps=4)
    endings = Endpoints(collect(teacher, settings, tmp_path, seed=0), 0.4)
    student = make_student(teacher, linearized, DistillationConfig(rank=4), seed=0)
    options = {"critic_steps": 2, "regression_weight": 0.5}
    losses = {}
    for kind in (None, endings):
        task = make_task(student, teacher, endings=kind, **options)
        for step in (0, 1):
            losses[kind, step] = task.loss(step, torch.Generator().manual_seed(step))
    (loss, metrics), (plain, _) = losses[endings, 0], losses[None, 0]
    torch.testing.assert_close(loss, plain + 0.5 * metrics["regression_loss"])
    assert "regression_loss" not in losses[endings, 1][1]
    torch.testing.assert_close(losses[endings, 1][0], losses[None, 1][0], rtol=0, atol=0)
    gradients = torch.autograd.grad(
        loss, list(student.weights.values()), allow_unused=True, retain_graph=True
    )
    assert any(g is not None and bool(g.any()) for g in gradients)


def config_of(out: Path) -> distill.DistillConfig:
    return distill.DistillConfig(
        out=out,
        trajectories=TrajectoryConfig(
            num_trajectories=3, states_per_trajectory=2, sampler_steps=4, shard_size=3
        ),
        distillation=DistillationConfig(num_steps=2, rank=4, critic_steps=2, regression_weight=0.5),
        training=TrainingConfig(steps=6, batch_size=4, checkpoint_every=2, log_every=1),
    )


def run(teacher: Teacher, first: Artifact, out: Path, progress: Any = silent) -> Artifact:
    config = config_of(out)
    student = make_student(teacher, first, config.distillation, seed=0)
    distill.distill(student, teacher, first, config, "fp32", progress)
    return artifact.load(out / distill.ARTIFACT_NAME)


def test_a_distillation_stopped_anywhere_ends_as_an_unbroken_one_and_names_its_steps(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    whole = run(teacher, linearized, tmp_path / "whole")
    assert whole.header.sigmas == pytest.approx(make_sigmas(2, 3.0).tolist())
    assert list(whole.header.layers) == [0, 2] and whole.header.objective == "dmd2"
    assert whole.header.provenance["transfer objective"] == "adm"
    usage = whole.header.usage
    assert (usage.guidance_scale, usage.shift, usage.steps, usage.sampler) == (1, 3, 2, "lcm")
    for at in (1, 3):
        with pytest.raises(Stop):
            run(teacher, linearized, tmp_path / f"at{at}", stopper(at))
        resumed = run(teacher, linearized, tmp_path / f"at{at}")
        files = [tmp_path / name / distill.ARTIFACT_NAME for name in ("whole", f"at{at}")]
        expected, found = (load_file(path) for path in files)
        assert expected.keys() == found.keys() and resumed.header.layers == whole.header.layers
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_distilled_file_is_not_distilled_again(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    run(teacher, linearized, tmp_path)
    with pytest.raises(ValueError, match="is distilled already; give the file that `transfer`"):
        load_linearized(tmp_path / distill.ARTIFACT_NAME)


def test_one_call_of_a_generator_predicts_the_video_itself() -> None:
    x0, noise, sigma = draw(2, 3, 1, 2, 2), draw(2, 3, 1, 2, 2, seed=1), torch.tensor([0.2, 0.9])
    found = velocity_to_x0(add_noise(x0, noise, sigma), noise - x0, sigma)
    torch.testing.assert_close(found, x0)
