"""What all objectives share: their settings, a batch, the velocity functions, what they return."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...flow import VelocityFn
from ...run.config import fraction, option, positive
from ...run.process_group import SINGLE_PROCESS, ProcessGroup
from ..noise_levels import LEVELS

OBJECTIVES = ("adm", "adm_literal", "velocity", "dmd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which loss, and where on the trajectory it is taken."""

    objective: str = option("adm", "what the student is trained to match", choices=OBJECTIVES)
    max_jump: int = option(6, "grid points that the student moves at most before it is compared")
    anchor_share: float = option(0.5, "share of a batch that adm compares where it was stored")
    levels: str = option(
        "flow", "noise levels drawn as the flow carries errors, or evenly", choices=LEVELS
    )
    velocity_share: float = option(0.0, "share of the steps that match velocities before all else")
    prompt_dropout: float = option(0.3, "share of a batch that trains the unconditional branch")
    critic_learning_rate: float = option(1e-4, "learning rate of the critic (dmd)")
    critic_steps: int = option(5, "critic updates for each update of the student (dmd)")

    def __post_init__(self) -> None:
        positive(self, "max_jump", "critic_learning_rate", "critic_steps")
        fraction(self, "anchor_share", "prompt_dropout", "velocity_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Stored states of the teacher's trajectories, each assigned to one guidance branch.

    latents, velocity: [B, C, F, H, W]; velocity is the teacher's, in the sample's branch.
    step: [B] int64, index into the sampling grid.
    processes: of whose batch this is a share; what is drawn for it is drawn for the whole.
    """

    latents: Tensor
    velocity: Tensor
    step: Tensor
    processes: ProcessGroup = SINGLE_PROCESS

    def part(self, part: slice) -> "Batch":
        """Return some of the samples."""
        return dataclasses.replace(
            self, latents=self.latents[part], velocity=self.velocity[part], step=self.step[part]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Velocity functions of the models, bound to the batch's prompts.

    student, teacher: the sample's own guidance branch.
    student_guided: both branches combined, as the sampler calls the student.
    part: makes the players of some of the batch's samples.
    critic: velocity of the student's own samples (dmd), None otherwise.
    """

    student: VelocityFn
    student_guided: VelocityFn
    teacher: VelocityFn
    part: Callable[[slice], "Players"]
    critic: VelocityFn | None = None


class Objective(Protocol):
    """A loss of the student on one batch.

    Returns the scalar loss and figures to log. Gradients reach the student (and the critic) alone.
    """

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def needs_critic(config: ObjectiveConfig) -> bool:
    """Say whether the objective trains a model of the student's own samples beside it."""
    return config.objective == "dmd"


def draw_jump(
    step: Tensor,
    max_jump: int,
    min_jump: int,
    num_steps: int,
    generator: torch.Generator,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Draw the grid index [B] that each sample moves to: `min_jump` to `max_jump` points on.

    The last index is `num_steps - 1`: at sigma 0 there is no score to match.
    """
    jump = processes.draw(
        len(step), lambda n: torch.randint(min_jump, max_jump + 1, (n,), generator=generator)
    )
    return (step + jump.to(step.device)).clamp(max=num_steps - 1)


def mean_square(x: Tensor) -> Tensor:
    """Return the mean over all but the batch axis of x squared, [B]."""
    return x.float().square().flatten(1).mean(dim=1)


def surrogate_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar whose gradient with respect to `latents` is `gradient` / B, per sample mean.

    Both are [B, ...]; nothing flows through `gradient`.
    """
    return (latents.float() * gradient.detach().float()).flatten(1).mean(dim=1).mean()
