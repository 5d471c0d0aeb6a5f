"""Arithmetic of layer scores r [layers]: the budget, held or lost for, and the rounding loss.

r = 1 is softmax, r = 0 linear, so 1 - r of a layer is how linear it is.
"""

import torch
from torch import Tensor

BUDGETS = ("exact", "sum", "rounded")


class _RoundStraightThrough(torch.autograd.Function):
    """Round forward, identity backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def budget_loss(layer_scores: Tensor, target: int, budget: str) -> Tensor:
    """Return `(number of linear layers - target)^2` for layer scores [layers] (LinVideo eq. 6).

    "rounded" counts `round(1 - r)` with a straight-through gradient, as the paper does: its sign
    flips whenever a layer crosses 0.5, which holds layers there. "sum" counts `1 - r` itself, and
    "exact" too: once scores are projected, it is 0.
    """
    linear = 1 - layer_scores
    if budget == "rounded":
        linear = _RoundStraightThrough.apply(linear)
    return (linear.sum() - target).square()


def project(layer_scores: Tensor, target: int) -> Tensor:
    """Return the nearest scores [layers] in [0, 1] whose sum of 1 - r is `target`, exactly.

    The Euclidean projection onto the capped simplex: `clamp(r - shift, 0, 1)`. The sum falls
    linearly between the shifts at which a score reaches 0 or 1, so it is solved between two.

    target: from 0 to the number of layers.
    """
    wanted = len(layer_scores) - target
    shifts = torch.cat([layer_scores, layer_scores - 1]).sort().values
    sums = (layer_scores - shifts.unsqueeze(1)).clamp(0, 1).sum(dim=1)
    right = (sums > wanted).sum(dim=0, keepdim=True).clamp(1, len(shifts) - 1)
    (low, high), (more, less) = ((x[right - 1], x[right]) for x in (shifts, sums))
    share = (more - wanted) / (more - less).clamp_min(1e-12)
    return (layer_scores - torch.lerp(low, high, share.clamp(0, 1))).clamp(0, 1)


def along_budget(layer_scores: Tensor) -> Tensor:
    """Return the same scores [layers] with the gradient's mean over those within (0, 1) taken out.

    Scores whose sum is held move against each other alone. An optimiser that divides each gradient
    by its own size would make one common push of them, which the projection takes back.
    """
    is_free = (layer_scores > 0) & (layer_scores < 1)
    mean = (layer_scores * is_free).sum() / is_free.sum().clamp_min(1)
    return torch.where(is_free, layer_scores - (mean - mean.detach()), layer_scores)


def rounding_loss(layer_scores: Tensor, alpha: float) -> Tensor:
    """Return `sum (1 - |2 r - 1|^alpha)`, zero only where every r is 0 or 1 (LinVideo eq. 7)."""
    return (1 - (2 * layer_scores - 1).abs().pow(alpha)).sum()
