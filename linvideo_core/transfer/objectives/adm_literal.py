"""Anytime distribution matching as the paper writes it (LinVideo eq. 8), kept for comparison.

Measured to drift on small models when used alone; `adm` is the stable form.
"""

import torch
from torch import Tensor

from ...flow import euler_step, expand
from .protocol import Batch, ObjectiveConfig, Players, draw_jump, surrogate_loss


def score_difference(
    latents: Tensor, sigma: Tensor, teacher_velocity: Tensor, self_velocity: Tensor
) -> Tensor:
    """Return dKL(q_t || p_t)/dx = `s_q - s_p = (1 - t)/t (u_teacher - u_student)` at x [B, ...].

    sigma: [B], greater than 0.
    """
    t = expand(sigma, latents)
    return (1 - t) / t * (teacher_velocity - self_velocity)


class LiteralAnytimeDistributionMatching:
    """Push the state that the student's step reached along the score difference."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.max_jump = config.max_jump
        self.sigmas = sigmas

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a surrogate whose gradient is eq. 8's; its value means nothing.

        The gradient flows through the student's step alone, not through either score; a state
        at the last noise level has no step left and gives none.
        """
        sigmas = self.sigmas.to(batch.latents.device)
        num_steps = len(sigmas) - 1
        reached = draw_jump(batch.step, self.max_jump, 1, num_steps, generator, batch.processes)
        start, sigma = sigmas[batch.step], sigmas[reached]
        latents = euler_step(batch.latents, players.student(batch.latents, start), start, sigma)
        with torch.no_grad():
            teacher_velocity = players.teacher(latents, sigma)
            self_velocity = players.student(latents, sigma)
            push = score_difference(latents, sigma, teacher_velocity, self_velocity)
        return surrogate_loss(latents, push), {"push": push.square().mean()}
