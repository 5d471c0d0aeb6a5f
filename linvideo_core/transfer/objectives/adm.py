"""Anytime distribution matching in a form that cannot drift: a least-squares score difference.

LinVideo's ADM (eq. 8) pushes the student's state x^_t along `s_p - s_q`, the score of the teacher
less the student's own. Both scores are affine in a velocity, `s_p - s_q = -(1 - t)/t (u_p - u_q)`,
so the push vanishes where the two velocities agree at the states that the student itself reaches.
The literal push acts on the parameters through the step that led to x^_t: what linear attention
cannot represent stays in it as a constant force and nothing balances it. Here the same two
velocities at the same states make the weighted Fisher divergence

    E_{x ~ q_t} w(t) |s_q(x) - s_p(x)|^2,    with w(t) = (t / (1 - t))^2, hence |u_q - u_p|^2,

whose gradient is taken at (x^_t, t) through u_q alone: bounded below, zero only at the same fixed
point, no critic.

A share of each batch stays at its stored state, where the teacher's velocity is known: plain
velocity matching, which keeps the student anchored where the teacher's sampler really goes, and
costs nothing more. Jumps lead away from high noise, where motion is decided: samples are weighted
so that every level that can be reached counts as it is drawn.
"""

import torch
from torch import Tensor

from ...flow import euler_step
from ...run.process_group import SINGLE_PROCESS, ProcessGroup
from ..noise_levels import level_density
from .protocol import Batch, ObjectiveConfig, Players, mean_square


def draw_move(
    step: Tensor,
    max_jump: int,
    num_steps: int,
    generator: torch.Generator,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Draw the grid index [B] that each sample moves to: 1 to `max_jump` points on, evenly.

    Where fewer points are left, among those; at the last index nothing moves.
    """
    room = (num_steps - 1 - step).clamp(max=max_jump)
    share = processes.draw(len(step), lambda n: torch.rand(n, generator=generator)).to(step.device)
    return step + torch.minimum((share * room).long() + 1, room)


def level_weights(max_jump: int, density: Tensor) -> Tensor:
    """Return the weight [num_steps] fp32 of a sample that has moved to each grid index.

    density: [num_steps], how likely a sample starts at each; the weights make it count as likely
    where it gets. They are 1 on average over the draws, 0 where no move leads.
    """
    num_steps = len(density)
    visits = torch.zeros(num_steps)
    for step in range(num_steps):
        room = min(max_jump, num_steps - 1 - step)
        visits[step + 1 : step + room + 1] += density[step] / max(1, room)
        visits[step] += density[step] * (room == 0)
    is_reached = visits > 0
    weights = density / (density[is_reached].sum() * visits)
    return torch.where(is_reached, weights, torch.zeros(()))


def count_anchored(num_samples: int, share: float, generator: torch.Generator) -> int:
    """Return how many of a batch's samples stay where they were stored: `share` of them on average.

    Where that is no whole number, one more by chance: of batches of one, every other stays.
    """
    wanted = round(num_samples * share, 6)
    if wanted.is_integer():
        return int(wanted)
    return int(wanted + torch.rand((), generator=generator).item())


class AnytimeDistributionMatching:
    """Match the teacher's velocity at stored states and at those that the student moves on to."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.config = config
        self.sigmas = sigmas
        self.weights = level_weights(config.max_jump, level_density(sigmas, config.levels))

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; see `Objective`. The jump is guided, as in sampling; no gradient."""
        sigmas = self.sigmas.to(batch.latents.device)
        num_samples = len(batch.step) * batch.processes.size
        num_of_all = count_anchored(num_samples, self.config.anchor_share, generator)
        # This process's rows are every `size`-th of the batch.
        num_anchored = len(range(batch.processes.rank, num_of_all, batch.processes.size))
        reached = draw_move(
            batch.step, self.config.max_jump, len(sigmas) - 1, generator, batch.processes
        )
        anchored = batch.part(slice(num_anchored))
        latents, target = anchored.latents, anchored.velocity
        if num_of_all < num_samples:
            moved, known = self._move(batch, reached, sigmas, players, num_anchored)
            latents, target = torch.cat([latents, moved]), torch.cat([target, known])
        reached = reached[num_anchored:]
        errors = mean_square(
            players.student(latents, sigmas[torch.cat([anchored.step, reached])]) - target
        )
        weights = self.weights.to(errors)[reached]
        weights = torch.cat([torch.ones_like(errors[:num_anchored]), weights])
        return (weights * errors).mean(), {}

    @torch.no_grad()
    def _move(
        self, batch: Batch, reached: Tensor, sigmas: Tensor, players: Players, num_anchored: int
    ) -> tuple[Tensor, Tensor]:
        """Return where the samples that are not anchored get, and the teacher's velocity there."""
        # Sharded models are called by all processes alike: one whose samples all stay calls along.
        first = min(num_anchored, len(batch.step) - 1)
        part = slice(first, None)
        moving, players = batch.part(part), players.part(part)
        start, end = sigmas[moving.step], sigmas[reached[part]]
        jump = players.student_guided(moving.latents, start)
        latents = euler_step(moving.latents, jump, start, end)
        velocity = players.teacher(latents, end)
        return latents[num_anchored - first :], velocity[num_anchored - first :]
