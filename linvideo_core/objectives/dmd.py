"""Distribution matching distillation with a trained critic (DMD2, arXiv 2405.14867), a baseline.

The student's clean estimate is noised again; the push is the difference of the teacher's and the
critic's velocity there. The critic learns the flow of the student's own estimates.
"""

import torch
from torch import Tensor

from ..flow import add_noise, expand, velocity_to_x0
from . import Batch, ObjectiveConfig, Players, mean_square, surrogate_loss

_SIGMA_RANGE = (0.02, 0.98)


class DistributionMatchingDistillation:
    """A generator push every `critic_steps` steps, a critic update at each."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.critic_steps = config.critic_steps
        self.sigmas = sigmas

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss plus, in its turn, a surrogate for the student's push."""
        B = len(batch.latents)
        device = batch.latents.device
        is_generator_turn = step % self.critic_steps == 0
        start = self.sigmas.to(device)[batch.step]
        with torch.set_grad_enabled(is_generator_turn):
            x0 = velocity_to_x0(batch.latents, players.student(batch.latents, start), start)
        low, high = _SIGMA_RANGE
        sigma = (low + (high - low) * torch.rand(B, generator=generator)).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        noisy = add_noise(x0.detach(), noise, sigma)
        critic_velocity = players.critic(noisy, sigma)
        critic_loss = mean_square(critic_velocity - (noise - x0.detach())).mean()
        if not is_generator_turn:
            return critic_loss, {"critic_loss": critic_loss.detach()}
        with torch.no_grad():
            push = self._push(noisy, sigma, players.teacher(noisy, sigma), critic_velocity, x0)
        return critic_loss + surrogate_loss(x0, push), {"critic_loss": critic_loss.detach()}

    @staticmethod
    def _push(noisy: Tensor, sigma: Tensor, teacher: Tensor, critic: Tensor, x0: Tensor) -> Tensor:
        """Return the normalised push on x0 (DMD2 eq. 7 and 8): x0 of the critic less teacher."""
        difference = expand(sigma, noisy) * (teacher - critic)
        distance = (x0 - velocity_to_x0(noisy, teacher, sigma)).abs().flatten(1).mean(dim=1)
        return difference / expand(distance.clamp_min(1e-6), noisy)
