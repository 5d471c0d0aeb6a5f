"""Velocity matching first, then another objective: the cheap one brings the student near.

Velocity matching needs no forward pass but the student's own; anytime distribution matching moves
the student and asks the teacher at every step, which is worth it where the student goes by itself.
"""

import torch
from torch import Tensor

from .protocol import Batch, Objective, Players


class VelocityFirst:
    """Ask `first` until `num_first` steps are done, and `then` from there on."""

    def __init__(self, first: Objective, then: Objective, num_first: int) -> None:
        self.first = first
        self.then = then
        self.num_first = num_first

    def __call__(
        self, batch: Batch, players: Players, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; see `Objective`."""
        objective = self.first if step < self.num_first else self.then
        return objective(batch, players, step, generator)
