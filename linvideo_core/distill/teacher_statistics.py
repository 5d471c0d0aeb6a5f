"""What the teacher's own videos are like, read off its stored trajectories."""

import dataclasses

import torch
from torch import Tensor

from ..flow import guide, velocity_to_x0
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.trajectories import States, Trajectories


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStatistics:
    """How varied the teacher's videos are and how much they move, to hold others against.

    spread: standard deviation over the videos, averaged over the latents' elements.
    motion: mean |x[f + 1] - x[f]| of the latents; 0 for a single frame.
    """

    spread: float
    motion: float

    def spread_ratio(self, x0: Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> Tensor:
        """Return the variety of x0 [B, C, F, H, W], B > 1, as a share of the teacher's.

        No gradient is right where there are several processes.
        """
        return _spread(x0, processes) / self.spread

    def motion_ratio(self, x0: Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> Tensor:
        """Return the motion of all processes' x0 [B, C, F, H, W] as a share of the teacher's.

        1 for stills. A process of many may have none: B = 0.
        """
        if not self.motion:
            return torch.ones((), device=x0.device)
        return processes.mean(_motion(x0), weight=len(x0)) / self.motion


class Endpoints:
    """States of the teacher's trajectories with the videos that they end in.

    The ways of few large steps: what a few-step model is to make of the state in one call.
    """

    def __init__(self, trajectories: Trajectories, min_sigma: float) -> None:
        """min_sigma: states below this noise level are left out.

        Raises ValueError where no state is left.
        """
        self.trajectories = trajectories
        sigma = trajectories.sigmas[trajectories.steps()]
        self.picks = (sigma >= min_sigma).nonzero().squeeze(1)
        if not len(self.picks):
            raise ValueError(
                f"no state was stored at noise levels from {min_sigma:.3g} up; give more "
                "--states-per-trajectory or --num-trajectories, or --regression-weight 0"
            )

    def draw(
        self,
        num_samples: int,
        generator: torch.Generator,
        device: torch.device | str,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> tuple[States, Tensor, Tensor]:
        """Return states, their noise levels [B], and the videos x0 [B, C, F, H, W].

        process group: of whose draw this process keeps `num_samples`.
        """
        picks = processes.draw(
            num_samples,
            lambda n: self.picks[torch.randint(len(self.picks), (n,), generator=generator)],
        )
        states = self.trajectories.take(picks, device)
        sigma = self.trajectories.sigmas.to(device)[states.step]
        return states, sigma, end_of(self.trajectories, picks, device)


def measure_likeness(trajectories: Trajectories) -> TeacherStatistics:
    """Measure the videos at the ends of all stored trajectories."""
    picks = torch.arange(0, len(trajectories), trajectories.states_per_trajectory)
    videos = end_of(trajectories, picks, "cpu")
    return TeacherStatistics(spread=_spread(videos).item(), motion=_motion(videos).item())


def end_of(trajectories: Trajectories, picks: Tensor, device: torch.device | str) -> Tensor:
    """Return the video x0 [B, C, F, H, W] where the trajectories of the states `picks` [B] end.

    It is the guided clean estimate at the last stored state, which lies near the end.
    """
    per_video = trajectories.states_per_trajectory
    last = picks // per_video * per_video + per_video - 1
    return guided_x0(trajectories, trajectories.take(last, device))


def guided_x0(trajectories: Trajectories, states: States) -> Tensor:
    """Return the teacher's guided clean estimate [B, C, F, H, W] at stored states."""
    velocity = guide(states.conditional, states.unconditional, trajectories.guidance_scale)
    sigma = trajectories.sigmas.to(states.latents.device)[states.step]
    return velocity_to_x0(states.latents, velocity, sigma)


def _spread(x: Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    return processes.std(x.float()).mean()


def _motion(x: Tensor) -> Tensor:
    frames = x.shape[2]
    return x.float().diff(dim=2).abs().mean() if frames > 1 else torch.zeros((), device=x.device)
