"""What is trained: groups of parameters, a loss, and what else must survive a restart."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a peak learning rate.

    every: steps between two of their updates, where players train in turns: the loss reaches them
        at its multiples alone, and their average counts those.
    betas: AdamW's, of the gradient's average and of its square's.
    player: groups of one player have their gradients clipped together.
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    player: str = ""


class Task(Protocol):
    """What is trained: parameters, a loss, and what else must survive a restart."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the trainable parameters; names are unique over all groups."""

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of one forward pass and figures to log."""

    def after_step(self, step: int) -> None:
        """React to a finished optimiser step."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides parameters, as JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
