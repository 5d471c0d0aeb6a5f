"""Do learned layer scores agree with a sensitivity ranking? Spearman's rank correlation of both."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...run.files import write_json
from ...run.folder import read_metrics
from .sensitivity import read_ranking, sensitivities

logger = logging.getLogger(__name__)

LAYER_ORDER_NAME = "layer_order.json"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation: 1 for the same order, -1 for the reverse.

    Pearson's correlation of the ranks; equal values share the mean of theirs, as layer scores do
    that all have reached 0 or 1. Not a number where a side is all the same, which has no order.

    Raises ValueError for different lengths or fewer than two values.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values given; as many of both, 2 or more, needed")
    left, right = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b))
    left, right = left - left.mean(), right - right.mean()
    scale = (left.square().sum() * right.square().sum()).sqrt()
    return ((left * right).sum() / scale).item() if scale > 0 else math.nan


def correlate(scores: Mapping[int, float], errors: Mapping[int, float], kind: str) -> float:
    """Return how well learned layer scores follow a ranking: 1 where the least sensitive go linear.

    scores: layer -> r, not rounded; errors: layer -> velocity error, as `sensitivity.measure`
    returns them; kind: of the ranking, one of `sensitivity.MEASURES`.

    Raises ValueError where the two are not of the same layers.
    """
    if sorted(scores) != sorted(errors):
        raise ValueError(f"scores of layers {sorted(scores)} and a ranking of {sorted(errors)}")
    costs = sensitivities(errors, kind)
    layers = list(scores)
    return rank_correlation([scores[i] for i in layers], [costs[i] for i in layers])


def learned_scores(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[int], hardened_at: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the layer scores last logged before the choice was made, and their mean over time.

    The last ones tend to 0 and 1, where they tie; the mean also tells which moved first.

    rows: of a training's metrics; layers: the model's, in depth order; hardened_at: steps of the
    selection.

    Raises ValueError where no row of the selection has scores of these layers.
    """
    logged = [
        row["layer_scores"]
        for row in rows
        if row["step"] < hardened_at and len(row.get("layer_scores", ())) == len(layers)
    ]
    if not logged:
        raise ValueError(
            f"no scores of {len(layers)} layers logged in the first {hardened_at} steps"
        )
    means = torch.tensor(logged, dtype=torch.float64).mean(dim=0).tolist()
    return dict(zip(layers, logged[-1], strict=True)), dict(zip(layers, means, strict=True))


def save_layer_order(metrics: Path, ranking: Path, path: Path, hardened_at: int) -> None:
    """Write, and log, how the scores of a training agree with the ranking in its folder, if any.

    The file holds the ranking's `measure`, the `last_scores` and `mean_scores` by layer, and the
    rank correlations `last_correlation` and `mean_correlation`, null where scores have no order.
    """
    found = read_ranking(ranking)
    if found is None or not metrics.exists():
        return
    kind, errors = found
    last, mean = learned_scores(read_metrics(metrics), sorted(errors), hardened_at)
    row = {"measure": kind, "last_scores": last, "mean_scores": mean}
    for name, scores in (("last", last), ("mean", mean)):
        row[f"{name}_correlation"] = correlate(scores, errors, kind)
    logger.info(
        "learned layer scores follow the %s ranking with a rank correlation of %.2f (mean over "
        "time %.2f)",
        kind,
        row["last_correlation"],
        row["mean_correlation"],
    )
    write_json(path, row)


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0, equal values sharing the mean of theirs."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    return (first + (sizes - 1) / 2).double()[group]
