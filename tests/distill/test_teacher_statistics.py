"""Where the teacher's trajectories end, and what few steps are to make of their states."""

from pathlib import Path

import pytest
import torch

from linvideo_core.distill import dmd2
from linvideo_core.distill.teacher_statistics import Endpoints, measure_statistics
from linvideo_core.flow import bind_guided, sample_euler
from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect

CONFIG = TrajectoryConfig(
    num_trajectories=5, states_per_trajectory=3, sampler_steps=6, shard_size=2
)


@pytest.fixture
def trajectories(teacher: Teacher, tmp_path: Path) -> Trajectories:
    return collect(teacher, CONFIG, Run(folder=tmp_path / "run"))


@pytest.mark.parametrize("min_sigma", [0.3, 0.8])
def test_states_of_high_noise_alone_are_drawn_each_with_its_own_video(
    teacher: Teacher, trajectories: Trajectories, min_sigma: float
) -> None:
    endpoints = Endpoints(trajectories, min_sigma)
    picks = endpoints.pick(11, torch.Generator().manual_seed(0))
    states, sigma, x0 = endpoints.take(picks, "cpu")
    assert bool((sigma >= min_sigma).all())
    torch.testing.assert_close(sigma, trajectories.sigmas[states.step])
    assert x0.dtype == torch.float32
    # Sampled on from the state, the teacher comes to the video.
    latents = states.latents
    for i, (state, step, prompt) in enumerate(
        zip(latents, states.step.tolist(), states.prompt.tolist(), strict=True)
    ):
        embeds = teacher.prompt_embeds[prompt : prompt + 1], teacher.negative_embeds.unsqueeze(0)
        velocity_fn = bind_guided(teacher.model, *embeds, trajectories.guidance_scale)
        end = sample_euler(velocity_fn, state.unsqueeze(0), trajectories.sigmas[step:])
        torch.testing.assert_close(end[0], x0[i], rtol=2e-3, atol=4e-3)


def test_the_teachers_statistics_are_those_of_the_ends(trajectories: Trajectories) -> None:
    ends = trajectories.take_ends(3 * torch.arange(5) + torch.tensor([0, 1, 2, 1, 0]), "cpu")
    found = measure_statistics(trajectories)
    assert found.spread == pytest.approx(ends.std(dim=0).mean().item())
    assert found.motion == pytest.approx((ends[:, :, 1] - ends[:, :, 0]).abs().mean().item())


def test_where_no_state_is_noisy_enough_the_sentence_says_what_to_give(
    trajectories: Trajectories,
) -> None:
    with pytest.raises(ValueError, match=r"from 1.01 up; give more --states-per-trajectory"):
        Endpoints(trajectories, 1.01)


def test_regression_is_the_mean_distance_and_pulls_towards_the_ending() -> None:
    x0 = torch.tensor([[1.0, -2.0], [0.5, 0.0]], requires_grad=True)
    ending = torch.tensor([[0.0, 0.0], [0.5, 4.0]])
    loss = dmd2.regression_loss(x0, ending)
    assert loss.item() == pytest.approx(7 / 4)
    loss.backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[0.25, -0.25], [0.0, -0.25]]))
