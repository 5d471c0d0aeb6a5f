"""What the teacher's own videos are like, read off its stored trajectories."""

import dataclasses

import torch
from torch import Tensor

from ..run.errors import SettingError
from ..teacher.trajectories import States, Trajectories


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStatistics:
    """How varied the teacher's videos are and how much they move, to compare others with.

    spread: standard deviation over the videos, averaged over the latents' elements.
    motion: mean |x[f + 1] - x[f]| of the latents; 0 for a single frame.
    """

    spread: float
    motion: float


class Endpoints:
    """States of the teacher's trajectories with the videos that they end in.

    A few-step model is to predict that video from the state in one call.
    """

    def __init__(self, trajectories: Trajectories, min_sigma: float) -> None:
        """min_sigma: states below this noise level are left out.

        Raises ValueError where no state is left.
        """
        self.trajectories = trajectories
        sigma = trajectories.sigmas[trajectories.steps()]
        self.picks = (sigma >= min_sigma).nonzero().squeeze(1)
        if not len(self.picks):
            raise SettingError(
                f"no state was stored at noise levels from {min_sigma:.3g} up; give more "
                "{states_per_trajectory} or {num_trajectories}, or {regression_weight} 0",
                "states_per_trajectory",
                "num_trajectories",
                "regression_weight",
            )

    def pick(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the numbers [num_samples] int64 of states."""
        return self.picks[torch.randint(len(self.picks), (num_samples,), generator=generator)]

    def take(self, picks: Tensor, device: torch.device | str) -> tuple[States, Tensor, Tensor]:
        """Return states, their noise levels [B], and the videos x0 [B, C, F, H, W]."""
        states = self.trajectories.take(picks, device)
        sigma = self.trajectories.sigmas.to(device)[states.step]
        return states, sigma, self.trajectories.take_ends(picks, device)


def measure_statistics(trajectories: Trajectories) -> TeacherStatistics:
    """Measure the videos at the ends of all stored trajectories."""
    picks = torch.arange(0, len(trajectories), trajectories.states_per_trajectory)
    videos = trajectories.take_ends(picks, "cpu")
    return TeacherStatistics(
        spread=videos.std(dim=0).mean().item(), motion=motion_of(videos).item()
    )


def motion_of(x: Tensor) -> Tensor:
    """Return mean |x[f + 1] - x[f]| of latents [B, C, F, H, W], a scalar; 0 for stills."""
    frames = x.shape[2]
    return x.float().diff(dim=2).abs().mean() if frames > 1 else torch.zeros((), device=x.device)
