"""Softmax within tiles beside linear attention, timed: `python -m benchmarks.kernels.hybrid`.

The fused kernels at Wan's shapes in bf16, forward and backward, beside the linear kernels that they
contain and softmax over all tokens. They must agree with their definition in fp64 before anything
is timed. A program takes up to 128 queries of one tile.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from linvideo_core.kernels import hybrid_attention, hybrid_reference, linear_attention
from linvideo_core.kernels.hybrid_reference import initial_weights
from linvideo_core.kernels.softmax import softmax_attention
from linvideo_core.kernels.tiles import Tiles
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags

from ..record import RESULTS_FOLDER, show_rows, write_record
from .agreement import compare
from .contenders import HEAD_DIM, TOLERANCE, Contender, Setting, Shape, make_inputs, on_gpu
from .speed import BACKWARD, FORWARD, NUM_COPIED, floor_milliseconds, measure_copy_bandwidth
from .timing import Call, milliseconds

_SMALL = [Tiles(grid=(21, 30, 52), tile=tile) for tile in ((1, 10, 11), (3, 10, 11), (3, 15, 14))]
_LARGE = [Tiles(grid=(21, 45, 80), tile=tile) for tile in ((3, 9, 8), (3, 15, 16), (7, 15, 16))]
CASES = {Shape(32760, 12): _SMALL, Shape(32760, 40): _SMALL, Shape(75600, 40): _LARGE}
"""Shape -> tiles: Wan 1.3B and 14B at 480p with 0.3, 1.0 and 1.8 % of the tokens a tile; 14B at
720p with 0.3, 1.0 and 2.2 %."""
CHECKED = (
    Tiles(grid=(7, 23, 25), tile=(3, 7, 9), before=5, after=67),
    Tiles(grid=(7, 23, 25), tile=(3, 15, 13)),
)
_ATTENTION_MASS = "query"
_RECORD_NAME = "hybrid_kernels.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridBenchmarkConfig(Settings):
    """How patiently each number is measured."""

    seconds: float = option(0.4, "for about how long a call is repeated", limits.POSITIVE)
    record: bool = option(False, f"write results/{_RECORD_NAME}")


def make_weights(heads: int, setting: Setting) -> dict[str, Tensor]:
    """Return a layer's weights as they may be after training, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    start = initial_weights(_ATTENTION_MASS, heads, HEAD_DIM).items()
    moved = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in start}
    return {name: x.to(setting.device) for name, x in moved.items()}


def check(
    tilings: Sequence[Tiles],
    heads: int,
    setting: Setting,
    *,
    backend: str = "triton",
    is_differentiable: bool = True,
) -> float:
    """Return the largest error against fp64, of the value or a gradient of tokens or maps.

    is_differentiable: whether gradients are compared, too.

    Raises RuntimeError where it is too large.
    """
    largest = 0.0
    weights = make_weights(heads, setting)
    for tiles in tilings:
        arguments = {"weights": weights, "tiles": tiles, "attention_mass": _ATTENTION_MASS}
        attend = functools.partial(hybrid_attention, **arguments, backend=backend)
        define = functools.partial(hybrid_reference.hybrid_attention, **arguments)
        inputs = make_inputs(Shape(tiles.num_tokens, heads), 1, setting)
        contender = Contender("hybrid", "linear", attend, is_differentiable, definition=define)
        for name, error in compare(contender, inputs, torch.randn_like(inputs[0])).items():
            if not error < TOLERANCE:
                raise RuntimeError(
                    f"{tiles} differs from its definition in fp64 by {error:.1e} ({name})"
                )
            largest = max(largest, error)
    return largest


def measure(
    cases: Mapping[Shape, Sequence[Tiles]], setting: Setting, num_copied: int = NUM_COPIED
) -> list[Row]:
    """Return a row for each pass and all tiles of each shape.

    floor_ratio: the hybrid layer's time over that of moving the bytes of a linear layer's pass, see
        `speed`; backward has the gradients of all that learns.
    added_teraflops: what softmax within tiles computes, 4 D for each pair of tokens and 10 D in
        backward, over the time beyond that of the linear layer.
    num_copied: see `measure_copy_bandwidth`.
    """
    bandwidth = measure_copy_bandwidth(setting, num_copied)
    return [row for case in cases.items() for row in _measure_shape(*case, setting, bandwidth)]


def _measure_shape(
    shape: Shape, tilings: Sequence[Tiles], setting: Setting, bandwidth: float
) -> list[Row]:
    inputs, weights = make_inputs(shape, 1, setting), make_weights(shape.heads, setting)
    linear = _time_passes(functools.partial(linear_attention, backend="triton"), inputs, setting)
    softmax = _time_passes(softmax_attention, inputs[:3], setting)
    rows = []
    for tiles in tilings:
        attend = functools.partial(attend_in_tiles, tiles, [*weights])
        hybrid = _time_passes(attend, [*inputs, *weights.values()], setting)
        for step, factor in ((FORWARD, 4), (BACKWARD, 10)):
            floor = floor_milliseconds(shape, step, setting.dtype.itemsize, bandwidth)
            flops = factor * HEAD_DIM * shape.heads * tiles.share * shape.tokens**2
            rows.append(
                {
                    "shape": str(shape),
                    "tile": "x".join(map(str, tiles.tile)),
                    "share_of_tokens": tiles.share,
                    "pass": step,
                    "linear_ms": linear[step],
                    "hybrid_ms": hybrid[step],
                    "softmax_ms": softmax[step],
                    "over_linear": hybrid[step] / linear[step],
                    "vs_softmax": softmax[step] / hybrid[step],
                    "floor_ratio": hybrid[step] / floor,
                    "added_teraflops": flops / (hybrid[step] - linear[step]) / 1e9,
                }
            )
    return rows


def attend_in_tiles(tiles: Tiles, names: Sequence[str], *tensors: Tensor) -> Tensor:
    """Return a hybrid layer's output; tensors: those of `make_inputs`, then its weights by name."""
    weights = dict(zip(names, tensors[5:], strict=True))
    return hybrid_attention(*tensors[:5], weights, tiles, _ATTENTION_MASS, backend="triton")


def make_calls(attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> dict[str, Call]:
    """Return what computes forward, without a graph, and backward alone, of all tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = attend(*leaves)
    upstream = torch.randn_like(output)
    return {
        FORWARD: torch.no_grad()(lambda: attend(*tensors)),
        BACKWARD: lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True),
    }


def _time_passes(
    attend: Callable[..., Tensor], tensors: Sequence[Tensor], setting: Setting
) -> dict[str, float]:
    """Return the milliseconds of each of `make_calls`."""
    times = {}
    for step, call in make_calls(attend, tensors).items():
        call()
        times[step] = milliseconds(call, setting.device, setting.seconds)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, check agreement, measure, show the table."""
    config = parse(HybridBenchmarkConfig, argv, description=__doc__)
    setting = on_gpu(config.seconds)
    error = check(CHECKED, 12, setting)
    sys.stdout.write(f"largest error against fp64: {error:.1e}\n")
    rows = measure(CASES, setting)
    if config.record:
        write_record(
            RESULTS_FOLDER / _RECORD_NAME,
            title="Softmax within tiles beside linear attention, heads of 128, bf16, batch 1",
            command=f"python -m benchmarks.kernels.hybrid {to_flags(config)}",
            rows=rows,
            device=setting.device,
            details={"largest_error": error},
        )
    sys.stdout.write(show_rows(rows))


if __name__ == "__main__":
    run_command(main)
