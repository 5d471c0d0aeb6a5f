"""Softmax within tiles beside linear attention, timed: `python -m benchmarks.kernels.hybrid`.

The fused kernel forward at Wan's shapes in bf16, beside the linear kernels that it contains and
softmax over all tokens. It must agree with its definition in fp64 before anything is timed.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from linvideo_core.kernels import linear_attention
from linvideo_core.kernels.hybrid_reference import HybridForm, hybrid_attention, initial_weights
from linvideo_core.kernels.softmax import softmax_attention
from linvideo_core.kernels.tiles import Tiles
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command
from linvideo_core.run.devices import resolve_device

from ..record import show_rows
from .agreement import relative_error
from .contenders import HEAD_DIM, TOLERANCE, Setting, Shape, make_inputs
from .speed import FORWARD, NUM_COPIED, floor_milliseconds, measure_copy_bandwidth
from .timing import milliseconds

_SMALL, _LARGE = (21, 30, 52), (21, 45, 80)
CASES = {
    12: [Tiles(grid=_SMALL, tile=tile) for tile in ((1, 10, 13), (3, 10, 13), (3, 15, 13))],
    40: [Tiles(grid=_LARGE, tile=tile) for tile in ((3, 9, 8), (3, 15, 16), (7, 15, 16))],
}
"""Heads -> tiles: Wan 1.3B at 480p with 0.4, 1.2 and 1.8 % of the tokens a tile; 14B at 720p with
0.3, 1.0 and 2.2 %."""
CHECKED = (
    Tiles(grid=(7, 23, 25), tile=(3, 7, 9), shift=(1, 3, 4), before=5, after=67),
    Tiles(grid=(7, 23, 25), tile=(3, 15, 13)),
)
_FORM = HybridForm(mass="query")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridBenchmarkConfig(Settings):
    """How patiently each number is measured."""

    seconds: float = option(0.4, "for about how long a call is repeated", limits.POSITIVE)


def make_weights(heads: int, setting: Setting) -> dict[str, Tensor]:
    """Return a form's weights as they may be after training, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    start = initial_weights(_FORM, heads, HEAD_DIM).items()
    moved = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in start}
    return {name: x.to(setting.device) for name, x in moved.items()}


def check(tilings: Sequence[Tiles], heads: int, setting: Setting) -> float:
    """Return the kernel's largest error against fp64; RuntimeError where it is too large."""
    from linvideo_core.kernels import hybrid_triton

    errors = []
    for tiles in tilings:
        inputs = make_inputs(Shape(tiles.num_tokens, heads), 1, setting)
        weights = make_weights(heads, setting)
        found, *_ = hybrid_triton.forward(*inputs, *weights.values(), tiles)
        expected = hybrid_attention(*(x.double() for x in inputs), weights, tiles, _FORM)
        errors.append(relative_error(found, expected))
        if not errors[-1] < TOLERANCE:
            raise RuntimeError(f"{tiles} differs from its definition in fp64 by {errors[-1]:.1e}")
    return max(errors)


def measure(
    cases: Mapping[int, Sequence[Tiles]], setting: Setting, num_copied: int = NUM_COPIED
) -> list[Row]:
    """Return a row for all tiles of each number of heads.

    floor_ratio: the hybrid layer's time over that of reading q, k, v and writing o once.
    added_teraflops: what softmax within tiles computes, 4 D for each pair of tokens, over the time
        beyond that of the linear layer.
    num_copied: see `measure_copy_bandwidth`.
    """
    bandwidth = measure_copy_bandwidth(setting, num_copied)
    return [row for case in cases.items() for row in _measure_shape(*case, setting, bandwidth)]


@torch.no_grad()
def _measure_shape(
    heads: int, tilings: Sequence[Tiles], setting: Setting, bandwidth: float
) -> list[Row]:
    from linvideo_core.kernels import hybrid_triton

    def time(attend: Callable[..., Any], *arguments: Any) -> float:
        attend(*arguments)
        return milliseconds(lambda: attend(*arguments), setting.device, setting.seconds)

    shape = Shape(tilings[0].num_tokens, heads)
    inputs, weights = make_inputs(shape, 1, setting), make_weights(heads, setting)
    linear = time(functools.partial(linear_attention, backend="triton"), *inputs)
    softmax = time(softmax_attention, *inputs[:3])
    floor = floor_milliseconds(shape, FORWARD, setting.dtype.itemsize, bandwidth)
    rows = []
    for tiles in tilings:
        hybrid = time(hybrid_triton.forward, *inputs, *weights.values(), tiles)
        flops = 4 * HEAD_DIM * heads * tiles.share * shape.tokens**2
        rows.append(
            {
                "shape": str(shape),
                "tile": "x".join(map(str, tiles.tile)),
                "share_of_tokens": tiles.share,
                "linear_ms": linear,
                "hybrid_ms": hybrid,
                "softmax_ms": softmax,
                "over_linear": hybrid / linear,
                "vs_softmax": softmax / hybrid,
                "floor_ratio": hybrid / floor,
                "added_teraflops": flops / (hybrid - linear) / 1e9,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, check agreement, measure, show the table."""
    config = parse(HybridBenchmarkConfig, argv, description=__doc__)
    setting = Setting(torch.device(resolve_device("cuda")), seconds=config.seconds)
    error = check(CHECKED, 12, setting)
    sys.stdout.write(f"largest error against fp64: {error:.1e}\n")
    sys.stdout.write(show_rows(measure(CASES, setting)))


if __name__ == "__main__":
    run_command(main)
