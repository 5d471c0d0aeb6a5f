"""Distribution matching distillation with a trained critic (DMD2, arXiv 2405.14867), a baseline.

The student's clean estimate at a stored state is noised again; the push is the difference of the
teacher's and the critic's velocity there. The critic learns the flow of the student's own
estimates. The formulas are `dmd2`'s.
"""

import torch
from torch import Tensor

from ...flow import add_noise, velocity_to_x0
from . import dmd2
from .protocol import Batch, ObjectiveConfig, Players


class DistributionMatchingDistillation:
    """A generator push every `critic_steps` steps, a critic update at each."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.critic_steps = config.critic_steps
        self.sigmas = sigmas

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss plus, in its turn, a surrogate for the student's push."""
        device = batch.latents.device
        is_generator_turn = step % self.critic_steps == 0
        start = self.sigmas.to(device)[batch.step]
        with torch.set_grad_enabled(is_generator_turn):
            x0 = velocity_to_x0(batch.latents, players.student(batch.latents, start), start)
        draw, shape = batch.processes.draw, x0.shape[1:]
        sigma = draw(len(x0), lambda n: dmd2.draw_score_sigma(n, 1.0, generator)).to(device)
        noise = draw(len(x0), lambda n: torch.randn(n, *shape, generator=generator)).to(device)
        noisy = add_noise(x0.detach(), noise, sigma)
        critic_velocity = players.critic(noisy, sigma)
        critic_loss = dmd2.critic_loss(critic_velocity, x0, noise)
        metrics = {"critic_loss": critic_loss.detach()}
        if not is_generator_turn:
            return critic_loss, metrics
        with torch.no_grad():
            teacher_velocity = players.teacher(noisy, sigma)
        push = dmd2.distribution_push(x0, noisy, sigma, teacher_velocity, critic_velocity)
        return critic_loss + dmd2.generator_loss(x0, push), metrics
