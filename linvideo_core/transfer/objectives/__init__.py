"""What the student is trained to do: one file an objective, all pure functions of velocities.

An objective sees stored states and velocity functions, never a model.
"""

from collections.abc import Callable

from torch import Tensor

from . import adm, adm_literal, dmd, staged, velocity
from .protocol import (
    OBJECTIVES,
    Batch,
    Objective,
    ObjectiveConfig,
    Players,
    mean_square,
    needs_critic,
)

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "ObjectiveConfig",
    "Players",
    "make_objective",
    "mean_square",
    "needs_critic",
]


def make_objective(config: ObjectiveConfig, sigmas: Tensor, num_steps: int = 0) -> Objective:
    """Return the objective that `config` names, on the sampling grid `sigmas` [steps + 1].

    num_steps: of the training, where a share of them matches velocities first.
    """
    makers: dict[str, Callable[[ObjectiveConfig, Tensor], Objective]] = {
        "adm": adm.AnytimeDistributionMatching,
        "adm_literal": adm_literal.LiteralAnytimeDistributionMatching,
        "velocity": velocity.VelocityMatching,
        "dmd": dmd.DistributionMatchingDistillation,
    }
    objective = makers[config.objective](config, sigmas)
    if num_first := round(config.velocity_share * num_steps):
        return staged.VelocityFirst(velocity.VelocityMatching(config, sigmas), objective, num_first)
    return objective
