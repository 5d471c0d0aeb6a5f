"""Velocity matching: mean squared error to the teacher at its own stored states (the baseline)."""

import torch
from torch import Tensor

from .protocol import Batch, ObjectiveConfig, Players, mean_square


class VelocityMatching:
    """`|u_student(x_t, t) - u_t|^2` on the stored pairs."""

    def __init__(self, config: ObjectiveConfig, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; see `Objective`."""
        sigma = self.sigmas.to(batch.latents.device)[batch.step]
        loss = mean_square(players.student(batch.latents, sigma) - batch.velocity).mean()
        return loss, {}
