"""Rectified-flow arithmetic against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from linvideo_core import flow

MEAN, STD = 0.7, 0.4
SIGMAS = (1.0, 0.97, 0.6, 0.31, 0.02)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def marginal(sigma: float) -> tuple[float, float]:
    """Return mean and variance of p_t for data N(MEAN, STD^2)."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * STD**2 + sigma**2


def exact_velocity(x: Tensor, sigma: float) -> Tensor:
    """Return E[noise - x0 | x_t = x] for Gaussian data."""
    mean, variance = marginal(sigma)
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return slope * (x - mean) - MEAN


def points() -> Tensor:
    return torch.linspace(-3, 3, 63, dtype=torch.float64).view(1, 1, 1, 7, 9)


def level(sigma: float) -> Tensor:
    return torch.tensor([sigma], dtype=torch.float64)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_velocity_to_score_is_the_gradient_of_a_gaussian_log_density(sigma: float) -> None:
    mean, variance = marginal(sigma)
    score = flow.velocity_to_score(points(), exact_velocity(points(), sigma), level(sigma))
    torch.testing.assert_close(score, -(points() - mean) / variance, **TOLERANCE)


@pytest.mark.parametrize("sigma", [*SIGMAS, 0.0])
def test_velocity_to_x0_is_the_posterior_mean_of_a_gaussian(sigma: float) -> None:
    mean, variance = marginal(sigma)
    expected = MEAN + (1 - sigma) * STD**2 / variance * (points() - mean)
    x0 = flow.velocity_to_x0(points(), exact_velocity(points(), sigma), level(sigma))
    torch.testing.assert_close(x0, expected, **TOLERANCE)


def test_noising_and_velocity_to_x0_are_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 1, 3, 5, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    noisy = flow.add_noise(x0, noise, sigma)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(noisy[2], x0[2])
    torch.testing.assert_close(flow.velocity_to_x0(noisy, noise - x0, sigma), x0)


def test_a_euler_step_along_a_straight_path_lands_on_it() -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, 2, 1, 3, 5, dtype=torch.float64, generator=generator)
    start, end = torch.tensor([[0.9, 0.5], [0.4, 0.0]], dtype=torch.float64)
    reached = flow.euler_step(flow.add_noise(x0, noise, start), noise - x0, start, end)
    torch.testing.assert_close(reached, flow.add_noise(x0, noise, end))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_sampling_a_constant_velocity_is_exact_at_any_number_of_steps(steps: int) -> None:
    noise, velocity = points(), points().cos()
    sigmas = flow.make_sigmas(steps, shift=3.0).double()
    reached = flow.sample_euler(lambda x, sigma: velocity, noise, sigmas)
    torch.testing.assert_close(reached, noise - velocity, **TOLERANCE)


def test_sampling_a_linear_field_converges_at_first_order() -> None:
    exact = points() * math.exp(-1.3)

    def error(steps: int) -> float:
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        reached = flow.sample_euler(lambda x, sigma: 1.3 * x, points(), sigmas)
        return float((reached - exact).abs().max())

    for steps in (64, 128, 256):
        assert error(steps) / error(2 * steps) == pytest.approx(2, rel=0.02)


def test_sampling_a_gaussian_flow_yields_the_data_distribution() -> None:
    # The exact flow maps a quantile of the noise to the same quantile of the data.
    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64)
    reached = flow.sample_euler(lambda x, s: exact_velocity(x, float(s)), points(), sigmas)
    torch.testing.assert_close(reached, MEAN + STD * points(), rtol=0, atol=5e-3)


def test_each_step_is_reported_before_it_is_taken() -> None:
    seen = []
    sigmas = flow.make_sigmas(3, 1.0)
    noise = torch.ones(1, 1, 1, 1, 1)
    end = flow.sample_euler(
        lambda x, sigma: x * sigma,
        noise,
        sigmas,
        on_step=lambda i, x, u: seen.append((i, float(x), float(u))),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert seen[0][1:] == (1.0, 1.0)
    _, latents, velocity = seen[-1]
    assert float(end) == pytest.approx(latents - velocity / 3)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_shift_one_leaves_the_grid_uniform(steps: int) -> None:
    torch.testing.assert_close(flow.make_sigmas(steps, 1.0), torch.linspace(1, 0, steps + 1))


def test_four_steps_with_shift_five_are_the_published_grid() -> None:
    expected = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0])
    torch.testing.assert_close(flow.make_sigmas(4, 5.0), expected)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
def test_a_grid_falls_strictly_from_one_to_zero(shift: float) -> None:
    sigmas = flow.make_sigmas(63, shift)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (64,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_shifts_compose_by_multiplication() -> None:
    sigmas = torch.linspace(0, 1, 63, dtype=torch.float64)
    twice = flow.shift_sigmas(flow.shift_sigmas(sigmas, 2.0), 3.0)
    torch.testing.assert_close(twice, flow.shift_sigmas(sigmas, 6.0))


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_branch() -> None:
    conditional, unconditional = points().sin(), points().cos()
    torch.testing.assert_close(flow.guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(flow.guide(conditional, unconditional, 0.0), unconditional)
    guided = flow.guide(conditional, unconditional, 5.0)
    torch.testing.assert_close(guided, 5 * conditional - 4 * unconditional)
