"""Few-step sampling predicts x0, renoises it with seeded noise, and ends on a prediction."""

import pytest
import torch
from torch import Tensor

from linvideo_core.flow import add_noise, make_sigmas, sample_few_step

SHAPE = (2, 3, 1, 5, 7)


def velocity_fn(latents: Tensor, sigma: Tensor) -> Tensor:
    """Depend on latents and noise level, as a model does."""
    return torch.sin(3 * latents) + sigma.view(-1, 1, 1, 1, 1)


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=make_generator(0))


def sample(noise: Tensor, sigmas: Tensor, *, seed: int = 1) -> Tensor:
    return sample_few_step(velocity_fn, noise, sigmas, generator=make_generator(seed))


def test_one_step_is_the_prediction_from_noise_and_draws_nothing(noise: Tensor) -> None:
    generator = make_generator(1)
    before = generator.get_state()
    x0 = sample_few_step(velocity_fn, noise, make_sigmas(1, 5.0), generator=generator)
    assert torch.equal(x0, noise - velocity_fn(noise, torch.ones(2)))
    assert torch.equal(generator.get_state(), before)


def test_a_grid_cut_in_two_gives_the_latents_of_the_whole(noise: Tensor) -> None:
    sigmas, generator = make_sigmas(4, 5.0), make_generator(1)
    middle = sample_few_step(velocity_fn, noise, sigmas[:3], generator=generator)
    end = sample_few_step(velocity_fn, middle, sigmas[2:], generator=generator)
    assert torch.equal(end, sample(noise, sigmas))


def test_the_seed_alone_decides_and_decides_something(noise: Tensor) -> None:
    sigmas = make_sigmas(4, 5.0)
    assert torch.equal(sample(noise, sigmas), sample(noise, sigmas))
    assert not torch.equal(sample(noise, sigmas), sample(noise, sigmas, seed=2))


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_model_that_knows_the_video_gives_it_back(noise: Tensor, steps: int) -> None:
    video = torch.randn(SHAPE, generator=make_generator(5))

    def know(latents: Tensor, sigma: Tensor) -> Tensor:
        return (latents - video) / sigma.view(-1, 1, 1, 1, 1)

    sigmas = make_sigmas(steps, 3.0)
    latents = sample_few_step(know, noise, sigmas, generator=make_generator(1))
    torch.testing.assert_close(latents, video, rtol=0, atol=2e-6)


def test_each_step_starts_from_the_last_prediction_under_fresh_noise(noise: Tensor) -> None:
    seen = []
    sigmas = make_sigmas(3, 5.0)
    last = sample_few_step(
        velocity_fn,
        noise,
        sigmas,
        generator=make_generator(1),
        on_step=lambda _, latents, x0: seen.append((latents, x0)),
    )
    assert len(seen) == 3 and torch.equal(last, seen[-1][1])
    fresh = make_generator(1)
    assert torch.equal(seen[0][0], noise)
    for i in (1, 2):
        expected = torch.randn(SHAPE, generator=fresh)
        assert torch.equal(seen[i][0], add_noise(seen[i - 1][1], expected, sigmas[i].expand(2)))
