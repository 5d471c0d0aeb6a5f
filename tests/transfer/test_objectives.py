"""The objective against a case where everything is known: Gaussian data, affine velocities.

The student's state at t' is N(m', s'^2); its step with u(x) = a x + b makes x_t = x + (t - t') u(x)
Gaussian too. Every expectation here is of a quadratic in x, so the two nodes m' - s' and m' + s'
as a batch make it exact.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linvideo_core.flow import euler_step, make_sigmas
from linvideo_core.transfer.config import LEVELS
from linvideo_core.transfer.objective import (
    Batch,
    adm_loss,
    count_stored,
    fitted_gain,
    level_density,
    level_weights,
    move,
)

DATA_MEAN, DATA_STD = 0.6, 0.5
STATE_MEAN, STATE_STD = 0.2, 0.9
SIGMAS = make_sigmas(6, 3.0).double()
NUM_STEPS = len(SIGMAS) - 1
Moments = tuple[Tensor, Tensor]


def as_latents(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def nodes() -> Tensor:
    """Return the two points whose mean and variance are those of the stored state."""
    return as_latents([STATE_MEAN - STATE_STD, STATE_MEAN + STATE_STD])


def teacher_moments(t: Tensor) -> Moments:
    """Return mean and standard deviation of p_t."""
    return (1 - t) * DATA_MEAN, ((1 - t) ** 2 * DATA_STD**2 + t**2).sqrt()


def gaussian_velocity(x: Tensor, t: Tensor, moments: Moments) -> Tensor:
    """Return the velocity whose score at t is that of N(mean, std^2)."""
    mean, std = moments
    return -(x - t * (x - mean) / std**2) / (1 - t)


def teacher(x: Tensor, sigma: Tensor, batch: Batch | None = None) -> Tensor:
    """Return E[noise - x0 | x_t] for Gaussian data, at every sigma, 1 included."""
    t = sigma.view(-1, 1, 1, 1, 1)
    mean, std = teacher_moments(t)
    return (t - (1 - t) * DATA_STD**2) / std**2 * (x - mean) - DATA_MEAN


def pushed_moments(a: float, b: float, start: Tensor, end: Tensor) -> Moments:
    """Return mean and standard deviation of q_t, reached from the state by one step."""
    step = end - start
    return STATE_MEAN + step * (a * STATE_MEAN + b), STATE_STD * (1 + step * a)


def parameters(a: float, b: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))


def make_batch(step: int, step_to: int | None = None, latents: Tensor | None = None) -> Batch:
    """Return a batch whose rows all move to `step_to`, or are all stored."""
    latents = nodes() if latents is None else latents
    B = len(latents)
    steps = torch.full((B,), step)
    embeds = torch.arange(float(B)).view(B, 1, 1)
    return Batch(
        latents=latents,
        velocity=teacher(latents, SIGMAS[steps]),
        unconditional=teacher(latents, SIGMAS[steps]),
        step=steps,
        is_stored=torch.full((B,), step_to is None),
        step_to=steps if step_to is None else torch.full((B,), step_to),
        weight=torch.ones(B),
        branch_embeds=embeds,
        prompt_embeds=embeds,
        negative_embeds=embeds,
        any_moves=step_to is not None,
    )


def loss_of(batch: Batch, student: Callable, **others: Callable) -> Tensor:
    velocities = {"student": student, "student_guided": student, "teacher": teacher}
    return adm_loss(batch, SIGMAS, **velocities | others)


@pytest.mark.parametrize(("departed", "length"), [(1, 1), (1, 4), (2, 2)])
def test_adm_is_the_weighted_fisher_divergence(departed: int, length: int) -> None:
    start, end = SIGMAS[departed], SIGMAS[departed + length]
    q, p = pushed_moments(-0.3, 0.4, start, end), teacher_moments(end)
    loss = loss_of(
        make_batch(departed, departed + length),
        lambda x, sigma, batch: gaussian_velocity(x, end, q),
        student_guided=lambda x, sigma, batch: -0.3 * x + 0.4,
    )
    slope = 1 / p[1] ** 2 - 1 / q[1] ** 2
    offset = q[0] / q[1] ** 2 - p[0] / p[1] ** 2
    fisher = (slope * q[0] + offset) ** 2 + slope**2 * q[1] ** 2
    expected = (end / (1 - end)) ** 2 * fisher
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch", [make_batch(0), make_batch(2, 4), make_batch(NUM_STEPS - 1)])
def test_adm_rests_exactly_where_the_velocities_agree(batch: Batch) -> None:
    def evaluate(offset: float, slope: float) -> tuple[float, float]:
        theta = parameters(offset, slope)
        student = lambda x, s, _: teacher(x, s) + theta[0] + theta[1] * x  # noqa: E731
        loss = loss_of(batch, student)
        gradient = torch.autograd.grad(loss, theta)
        return loss.item(), torch.stack(gradient).abs().max().item()

    assert evaluate(0.0, 0.0) == (0.0, 0.0)
    for offset, slope in ((0.1, 0.0), (0.0, -0.1), (1e-3, 2e-3)):
        loss, gradient = evaluate(offset, slope)
        assert loss > 0 and gradient > 0


def test_the_gradient_stops_at_the_move() -> None:
    theta = parameters(-0.3, 0.4)
    student = lambda x, sigma, batch: theta[0] * x + theta[1]  # noqa: E731
    start, end = (SIGMAS[i].expand(2) for i in (1, 4))
    with torch.no_grad():
        reached = euler_step(nodes(), student(nodes(), start, None), start, end)
    expected = (student(reached, end, None) - teacher(reached, end)).square().mean()
    found = loss_of(make_batch(1, 4), student)
    gradients = (torch.autograd.grad(loss, theta) for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_stored_rows_alone_are_velocity_matching_and_ask_the_student_alone() -> None:
    batch = make_batch(2)

    def never(*_: Any) -> Tensor:
        raise AssertionError("asked without need")

    student = lambda x, sigma, batch: 0.5 * x  # noqa: E731
    loss = loss_of(batch, student, student_guided=never, teacher=never)
    expected = (0.5 * batch.latents - batch.velocity).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stored", [[True] * 3 + [False] * 4, [False] * 7])
def test_moving_rows_move_as_the_sampler_does_with_their_own_prompts(stored: list[bool]) -> None:
    batch = make_batch(2, 4, as_latents([0.1 * i for i in range(7)]))
    is_stored = torch.tensor(stored)
    batch.__dict__.update(
        is_stored=is_stored, step_to=torch.where(is_stored, batch.step, batch.step_to)
    )
    seen: list[str] = []
    asked: dict[str, tuple[Tensor, Tensor, Batch]] = {}

    def note(name: str) -> Callable:
        def velocity(x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
            seen.append(name)
            asked[name] = (x, sigma, batch)
            return teacher(x, sigma)

        return velocity

    loss_of(batch, note("student"), student_guided=note("guided"), teacher=note("teacher"))
    assert seen == ["guided", "teacher", "student"]
    moves = ~is_stored
    for name in ("guided", "teacher"):
        assert torch.equal(asked[name][2].branch_embeds, batch.branch_embeds[moves])
    assert torch.equal(asked["guided"][0], batch.latents[moves])
    latents, sigma, _ = asked["student"]
    assert torch.equal(latents[is_stored], batch.latents[is_stored])
    assert torch.equal(latents[moves], asked["teacher"][0])
    assert torch.equal(sigma, SIGMAS[batch.step_to])


def test_a_process_whose_rows_all_stay_calls_the_models_that_others_call() -> None:
    batch = make_batch(2)
    batch.__dict__.update(any_moves=True)
    seen: list[int] = []

    def counted(x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        seen.append(len(x))
        return teacher(x, sigma)

    student = lambda x, sigma, batch: 0.5 * x  # noqa: E731
    found = loss_of(batch, student, student_guided=counted, teacher=counted)
    assert found == loss_of(make_batch(2), student)
    assert seen == [1, 1]


@pytest.mark.parametrize(("num_samples", "share"), [(1, 0.5), (3, 0.5), (7, 0.3), (10, 0.3)])
def test_the_share_of_stored_rows_is_met_on_average(num_samples: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [count_stored(num_samples, share, generator) for _ in range(2000)]
    assert sum(counts) / len(counts) == pytest.approx(num_samples * share, abs=0.04)
    assert max(counts) - min(counts) <= 1 and min(counts) == int(num_samples * share)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("max_jump", "num_steps"), [(1, 2), (6, 50), (3, 7), (100, 20), (4, 1)])
def test_every_noise_level_that_a_move_reaches_counts_as_it_is_drawn(
    max_jump: int, num_steps: int, levels: str
) -> None:
    density = level_density(make_sigmas(num_steps, 3.0), levels)
    assert density.shape == (num_steps,) and bool((density > 0).all())
    assert density.sum().item() == pytest.approx(1)
    assert levels != "even" or density.unique().numel() == 1
    # Evenly many samples, each worth its level's density, are as many as that would draw.
    steps = torch.arange(num_steps).repeat(4000)
    worth = density[steps] * num_steps
    uniform = torch.rand(len(steps), generator=torch.Generator().manual_seed(0))
    reached = move(steps, uniform, max_jump, num_steps)
    moves = reached - steps
    room = (num_steps - 1 - steps).clamp(max=max_jump)
    assert bool((moves <= room).all()) and bool((moves >= room.clamp(max=1)).all())
    weights = level_weights(max_jump, density)
    weight_at = torch.zeros(num_steps).index_add_(0, reached, worth * weights[reached])
    is_reached = weights > 0
    assert is_reached.tolist() == [num_steps == 1] + [True] * (num_steps - 1)
    expected = torch.where(is_reached, density, 0) / density[is_reached].sum()
    torch.testing.assert_close(weight_at / len(reached), expected, rtol=0.1, atol=0)


def test_the_fitted_gain_falls_with_the_noise_and_ends_at_one() -> None:
    gain = fitted_gain(torch.linspace(1, 0, 101))
    assert bool((gain.diff() <= 0).all())
    assert gain[0] == 1600 and gain[-1] == 1
