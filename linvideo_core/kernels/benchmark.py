"""Measure what a layer costs as videos grow: `python -m linvideo_core.kernels.benchmark`.

One linear and one softmax attention layer, one head of 128 in fp32 on the CPU, over a doubling
number of tokens. Before anything is timed both must agree with their definition in fp64.
    python -m linvideo_core.kernels.benchmark                    # minutes; README's table
    python -m linvideo_core.kernels.benchmark --most-tokens 4096 --out runs/cost
The folder `--out` then holds cost_cpu.json and cost_cpu.png.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import logging
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import option, parse, positive, run_command, to_flags, to_json
from ..progress import Progress, TqdmProgress, silent
from ..records import RESULTS_FOLDER, write_record
from ..report import plot_cost
from ..tables import render_table
from . import linear_attention

logger = logging.getLogger(__name__)

HEAD_DIM = 128
LAYERS = ("linear", "softmax")
NAME = "cost_cpu"

_CHECKED_TOKENS = 257
_TOLERANCE = 1e-4
_WARM_UP_TOKENS = 512
_MEGABYTE = 2**20
_M_MMAP_THRESHOLD = -3

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """How many tokens, and how patiently each number is measured."""

    fewest_tokens: int = option(1024, "tokens of the shortest video")
    most_tokens: int = option(65536, "tokens of the longest video; each is twice the one before")
    runs: int = option(7, "most runs behind a time, which is their median")
    seconds: float = option(25.0, "time after which no further run of a size is started")
    seed: int = option(0, "seed of the tensors")
    out: Path | None = option(None, "folder for cost_cpu.json and cost_cpu.png; none: results")

    def __post_init__(self) -> None:
        positive(self, "fewest_tokens", "runs", "seconds")
        if self.most_tokens < 2 * self.fewest_tokens:
            raise ValueError(
                f"--most-tokens {self.most_tokens} given; at least twice --fewest-tokens "
                f"{self.fewest_tokens} is needed"
            )

    @property
    def folder(self) -> Path:
        """Where table and picture go."""
        return self.out or RESULTS_FOLDER

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens, ascending."""
        doublings = int(math.log2(self.most_tokens / self.fewest_tokens))
        return [self.fewest_tokens * 2**i for i in range(doublings + 1)]


def make_layer(layer: str, tokens: int, seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a layer's function and its arguments: query, key, value [1, L, 1, D], feature maps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens, 1, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator) for _ in range(3)]
    # As trained models start: features of unit scale, as many of them as the head has dimensions.
    maps = torch.randn(2, 1, HEAD_DIM, HEAD_DIM // 2, generator=generator) * HEAD_DIM**-0.75
    if layer == "linear":
        return linear_attention, [*inputs, *maps]
    return _attend_softmax, inputs


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
def measure_milliseconds(layer: str, tokens: int, config: BenchmarkConfig) -> float:
    """Return the median time of a layer; the first run is left out where there are more."""
    attend, arguments = make_layer(layer, tokens, config.seed)
    times: list[float] = []
    while len(times) <= config.runs and sum(times) < config.seconds:
        started = time.perf_counter()
        attend(*arguments)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:] or times)


@torch.inference_mode()
def measure_extra_mb(layer: str, tokens: int, config: BenchmarkConfig) -> float:
    """Return by how much a layer raises the peak of resident memory: output and all temporaries.

    To be called once in a process: memory that an earlier call freed could be used again unseen.
    """
    _free_at_once()
    warm_attend, warm_arguments = make_layer(layer, min(_WARM_UP_TOKENS, tokens // 2), config.seed)
    warm_attend(*warm_arguments)
    attend, arguments = make_layer(layer, tokens, config.seed)
    before = _reset_peak_memory()
    attend(*arguments)
    return (_peak_memory() - before) / _MEGABYTE


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


def run(config: BenchmarkConfig, progress: Progress = silent) -> dict[str, Any]:
    """Check both layers, measure them at every size, write record and picture.

    Returns the record.
    """
    for layer, error in check_agreement(config.seed).items():
        logger.info("%s layer: %.1e from its definition in fp64", layer, error)
    config.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    tasks = [(layer, tokens) for tokens in config.sizes for layer in LAYERS]
    for i, (layer, tokens) in enumerate(tasks):
        progress("measuring", i, len(tasks))
        rows.append(
            {
                "tokens": tokens,
                "layer": layer,
                "milliseconds": _call_apart(measure_milliseconds, layer, tokens, config),
                "extra_mb": _call_apart(measure_extra_mb, layer, tokens, config),
            }
        )
    progress("measuring", len(tasks), len(tasks))
    slopes = {layer: fit_slope(rows, layer, "milliseconds") for layer in LAYERS}
    fitted = ", ".join(f"{layer} n^{slope:.2f}" for layer, slope in slopes.items())
    plot_cost(rows, config.folder / f"{NAME}.png", slopes=slopes)
    flags = to_flags(config, without=["out"])
    return write_record(
        config.folder / f"{NAME}.json",
        title=f"One attention layer, one head of {HEAD_DIM}, fp32: time grows as {fitted}",
        command=f"python -m linvideo_core.kernels.benchmark {flags}".strip(),
        rows=rows,
        device="cpu",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure with a progress bar, show the table."""
    config, is_dry_run = parse(BenchmarkConfig, argv, description=__doc__.splitlines()[0])
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    with TqdmProgress() as progress:
        record = run(config, progress)
    sys.stdout.write(f"\n{record['title']}\n\n{render_table(record['rows'])}\n")
    for key in ("milliseconds", "extra_mb"):
        slopes = [f"{layer} {fit_slope(record['rows'], layer, key):.2f}" for layer in LAYERS]
        sys.stdout.write(f"log-log slope of {key}, upper half of the sizes: {', '.join(slopes)}\n")
    sys.stdout.write(f"table and picture: {config.folder}\n")


def _attend_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _features(projected: Tensor) -> Tensor:
    return torch.cat([projected.softmax(dim=1), (-projected).softmax(dim=1)], dim=1)


def _call_apart(
    measure: Callable[[str, int, BenchmarkConfig], float],
    layer: str,
    tokens: int,
    config: BenchmarkConfig,
) -> float:
    """Call a measurement in a fresh process, which no earlier one has touched."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, layer, tokens, config).result()


def _free_at_once() -> None:
    """Make glibc hand freed tensors back to the system, so that holes in its heap do not count."""
    if sys.platform == "linux":
        # Other C libraries have no mallopt.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _reset_peak_memory() -> int:
    """Return the peak of resident memory so far, on Linux lowered first to what is in use now."""
    if sys.platform == "linux":
        # A container may forbid it: the peak so far is then a little above what is in use.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """Return this process's peak of resident memory in bytes."""
    if sys.platform == "linux":
        # Unlike ru_maxrss, VmHWM follows a reset.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    run_command(main)
