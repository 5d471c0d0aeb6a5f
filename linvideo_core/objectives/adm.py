"""Anytime distribution matching in a form that cannot drift: a least-squares score difference.

LinVideo's ADM (eq. 8) pushes the student's state x^_t along `s_p - s_q`, the score of the teacher
less the student's own. Both scores are affine in a velocity, `s_p - s_q = -(1 - t)/t (u_p - u_q)`,
so the push vanishes where the two velocities agree at the states that the student itself reaches.
The literal push acts on the parameters through the step that led to x^_t: what linear attention
cannot represent stays in it as a constant force and nothing balances it. Here the same two
velocities at the same states make the weighted Fisher divergence

    E_{x ~ q_t} w(t) |s_q(x) - s_p(x)|^2,    with w(t) = (t / (1 - t))^2, hence |u_q - u_p|^2,

whose gradient is taken at (x^_t, t) through u_q alone: bounded below, zero only at the same fixed
point, no critic. A jump of zero grid points is plain velocity matching at a stored state; it keeps
the student anchored where the teacher's sampler really goes.
"""

import torch
from torch import Tensor

from ..flow import euler_step
from . import Batch, ObjectiveConfig, Players, draw_jump, mean_square


class AnytimeDistributionMatching:
    """Match the teacher's velocity at states that the student reaches by jumps of 0..max_jump."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.max_jump = config.max_jump
        self.sigmas = sigmas

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; see `Objective`. The jump is guided, as in sampling; no gradient."""
        sigmas = self.sigmas.to(batch.latents.device)
        num_steps = len(sigmas) - 1
        reached = draw_jump(batch.step, self.max_jump, 0, num_steps, generator, batch.team)
        start, sigma = sigmas[batch.step], sigmas[reached]
        with torch.no_grad():
            jump = players.student_guided(batch.latents, start)
            latents = euler_step(batch.latents, jump, start, sigma)
            target = players.teacher(latents, sigma)
        return mean_square(players.student(latents, sigma) - target).mean(), {}
