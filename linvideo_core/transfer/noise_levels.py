"""How often a training looks at each noise level: evenly, or as far as an error there is carried.

A student's velocity is wrong by e_i at the grid point i. To first order its video ends

    sum_i  J_i (s_i - s_i+1) e_i

away from the teacher's, with J_i what the teacher's own flow makes of a small push on the way from
there to the end. By Cauchy and Schwarz the square of that is at most

    (sum_i a_i) (sum_i a_i |e_i|^2),    a_i = (s_i - s_i+1) |J_i|,

so a squared error that weighs each level by a_i bounds what is seen at the end. |J_i|^2, the gain,
is measured by `flow_gain`: an error hardly grows below s = 0.8, and its square a thousandfold near
s = 1, where what is drawn is decided.
"""

import torch
from torch import Tensor

LEVELS = ("even", "flow")

# Of the order of what is measured at s = 1 itself, where the formula has no end.
_MOST = 1600.0


def fitted_gain(sigma: Tensor) -> Tensor:
    """Return `1 + (s / (1 - s))^2 / 4`, at most 1600, for noise levels of any shape.

    Below s = 0.9 it is at most 1.6 times what `flow_gain` measured on the embedded model, nearer to
    1 about a third: there a few videos become others, and their mean is all of the gain.
    """
    return (1 + (sigma / (1 - sigma)).square() / 4).clamp(max=_MOST)


def level_density(sigmas: Tensor, levels: str) -> Tensor:
    """Return how likely each level is to be drawn, [steps] fp32 that sum to 1.

    sigmas: the sampling grid [steps + 1]. levels: one of LEVELS.
    """
    if levels == "even":
        return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1))
    weights = (sigmas[:-1] - sigmas[1:]) * fitted_gain(sigmas[:-1]).sqrt()
    return weights / weights.sum()
