"""What one attention layer costs on a CPU as videos grow, softmax beside linear.

One head of 128 in fp32, in plain PyTorch. Both layers must agree with their definition in fp64
before anything is timed; every number is measured in a process of its own.
"""

import concurrent.futures
import math
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linvideo_core.kernels import linear_attention, softmax_attention

from .timing import CpuInstruments, free_at_once

HEAD_DIM = 128
LAYERS = ("linear", "softmax")

_CHECKED_TOKENS = 257
_TOLERANCE = 1e-4
_WARM_UP_TOKENS = 512

Row = dict[str, Any]


def make_layer(layer: str, tokens: int, seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a layer's function and its arguments: query, key, value [1, L, 1, D], feature maps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens, 1, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator) for _ in range(3)]
    # As trained models start: features of unit scale, as many of them as the head has dimensions.
    maps = torch.randn(2, 1, HEAD_DIM, HEAD_DIM // 2, generator=generator) * HEAD_DIM**-0.75
    if layer == "linear":
        return linear_attention, [*inputs, *maps]
    return softmax_attention, inputs


def check_agreement(seed: int = 0) -> dict[str, float]:
    """Compare both layers with a quadratic fp64 computation of what they are to compute.

    Returns the largest error of each layer relative to the largest output.
    Raises RuntimeError for a layer that is wrong: its speed would mean nothing.
    """
    errors = {}
    for layer in LAYERS:
        attend, arguments = make_layer(layer, _CHECKED_TOKENS, seed)
        with torch.inference_mode():
            output = attend(*arguments)[0, :, 0].double()
        query, key, value = (x[0, :, 0].double() for x in arguments[:3])
        if layer == "softmax":
            weights = torch.exp(query @ key.T / math.sqrt(HEAD_DIM))
        else:
            query_map, key_map = (x[0].double() for x in arguments[3:])
            weights = _features(query @ query_map) @ _features(key @ key_map).T
        expected = weights / weights.sum(dim=1, keepdim=True) @ value
        errors[layer] = ((output - expected).abs().max() / expected.abs().max()).item()
        if not errors[layer] < _TOLERANCE:
            raise RuntimeError(
                f"the {layer} layer differs from its definition by {errors[layer]:.1e}; nothing "
                "was timed"
            )
    return errors


@torch.inference_mode()
def measure_milliseconds(layer: str, tokens: int, seed: int, *, runs: int, seconds: float) -> float:
    """Return the median time of a layer; the first run is left out where there are more."""
    attend, arguments = make_layer(layer, tokens, seed)
    instruments = CpuInstruments(runs=runs, seconds=seconds)
    return instruments.milliseconds(lambda: attend(*arguments))


@torch.inference_mode()
def measure_extra_mb(layer: str, tokens: int, seed: int) -> float:
    """Return by how much a layer raises the peak of resident memory: output and all temporaries.

    To be called once in a process: memory that an earlier call freed could be used again unseen.
    """
    free_at_once()
    warm_attend, warm_arguments = make_layer(layer, min(_WARM_UP_TOKENS, tokens // 2), seed)
    warm_attend(*warm_arguments)
    attend, arguments = make_layer(layer, tokens, seed)
    return CpuInstruments(runs=1, seconds=0).extra_mb(lambda: attend(*arguments))


def fit_slope(rows: Sequence[Row], layer: str, key: str) -> float:
    """Return the slope of log(key) over log(tokens) in the upper half of a layer's sizes.

    Small sizes are left out because fixed costs flatten them. NaN where too little was measured.
    """
    points = sorted((row["tokens"], row[key]) for row in rows if row["layer"] == layer)
    points = [point for point in points[min(len(points) // 2, len(points) - 2) :] if point[1] > 0]
    if len(points) < 2:
        return math.nan
    x, y = (torch.tensor(side, dtype=torch.float64).log() for side in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def measure_cost(
    sizes: Sequence[int],
    seed: int,
    *,
    runs: int,
    seconds: float,
    progress: Callable[[str, int, int], None],
) -> list[Row]:
    """Measure both layers at every number of tokens.

    runs, seconds: a time is the median of this many runs, or of those that fit into the seconds.

    Returns rows of `tokens`, `layer`, `milliseconds` and `extra_mb`.
    """
    rows: list[Row] = []
    tasks = [(layer, tokens) for tokens in sizes for layer in LAYERS]
    for i, (layer, tokens) in enumerate(tasks):
        progress("measuring", i, len(tasks))
        milliseconds = _call_apart(
            measure_milliseconds, layer, tokens, seed, runs=runs, seconds=seconds
        )
        rows.append(
            {
                "tokens": tokens,
                "layer": layer,
                "milliseconds": milliseconds,
                "extra_mb": _call_apart(measure_extra_mb, layer, tokens, seed),
            }
        )
    progress("measuring", len(tasks), len(tasks))
    return rows


def _features(projected: Tensor) -> Tensor:
    return torch.cat([projected.softmax(dim=1), (-projected).softmax(dim=1)], dim=1)


def _call_apart(measure: Callable[..., float], *arguments: Any, **settings: Any) -> float:
    """Call a measurement in a fresh process, which no earlier one has touched."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, *arguments, **settings).result()
