"""Measure what attention costs as videos grow: `python -m benchmarks.kernels`.

On a GPU: the fused kernels at Wan's shapes in bf16, forward, backward and with norm and rotation,
over their byte floor and against softmax and plain PyTorch. On a CPU: one linear and one softmax
layer, one head of 128 in fp32, over a doubling number of tokens. All must agree with their
definition in fp64 before anything is timed.
    python -m benchmarks.kernels                    # minutes; the tables of docs/kernels.md
    python -m benchmarks.kernels --device cpu --most-tokens 4096 --out runs/cost
The folder `--out` then holds kernels.json and kernels.png, or cost_cpu.json and cost_cpu.png.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.evaluate.plots import (
    INK,
    draw_lines,
    group_rows,
    new_figure,
    save_figure,
    scale_by_decades,
    style_axes,
    title_axes,
)
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError

from ..record import RESULTS_FOLDER, show_rows, write_record
from . import speed
from .contenders import HEAD_DIM, Setting, find_modules, find_public, make_contenders

FEWEST_TOKENS = 1024
LAYERS = ("linear", "softmax")

_MOST_TOKENS = {"cpu": 65536, "cuda": 131072}
_SECONDS = {"cpu": 25.0, "cuda": 0.4}
_CPU_TOLERANCE = 1e-4

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Settings):
    """Where, how many tokens, and how patiently each number is measured."""

    device: str = option(
        "auto", "what is measured; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    most_tokens: int | None = option(
        None,
        f"tokens of the longest video, each twice the one before, from {FEWEST_TOKENS}; none: "
        "65536, cuda 131072",
    )
    seconds: float | None = option(
        None,
        "for about how long a call is repeated, its time being the median; none: 25, cuda 0.4",
        limits.POSITIVE,
    )
    out: Path | None = option(None, "folder for record and picture; none: results")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_tokens is not None and self.most_tokens < 2 * FEWEST_TOKENS:
            raise SettingError(
                f"{{most_tokens}} {self.most_tokens} given; at least {2 * FEWEST_TOKENS} is needed",
                "most_tokens",
            )


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Check agreement, measure, write record and picture; return the record."""
    device = resolve_device(config.device)
    config = dataclasses.replace(config, device=device)
    seconds = config.seconds or _SECONDS[device]
    doublings = ((config.most_tokens or _MOST_TOKENS[device]) // FEWEST_TOKENS).bit_length()
    sizes = [FEWEST_TOKENS * 2**i for i in range(doublings)]
    if device == "cpu":
        rows = _measure_cost(sizes, Setting(torch.device("cpu"), torch.float32, seconds))
        title = f"One attention layer, one head of {HEAD_DIM}, fp32"
        return _write(config, "cost_cpu", title, rows, over_tokens=rows)
    public, absent = find_public()
    modules, no_module = find_modules()
    contenders = [*make_contenders(), *public]
    setting = Setting(torch.device("cuda"), seconds=seconds)
    rows, details = speed.measure_speed(speed.SHAPES, sizes, contenders, modules, setting)
    details["left_out"] = [*absent, *no_module, *details["left_out"]]
    title = (
        f"Fused linear attention, heads of {HEAD_DIM}, bf16, batch 1; floor: bytes at the "
        f"{details['copy_terabytes_per_second']:.2f} TB/s of a copy"
    )
    return _write(config, "kernels", title, rows, details["over_tokens"], details)


def _measure_cost(sizes: Sequence[int], setting: Setting) -> list[Row]:
    contenders = [
        dataclasses.replace(contender, tolerance=_CPU_TOLERANCE)
        for contender in make_contenders("reference")
        if contender.name in ("fused", "sdpa")
    ]
    agreeing, _, left_out = speed.check_contenders(contenders, setting, (257,), heads=1)
    if left_out:
        raise RuntimeError(left_out[0])
    return speed.measure_over_tokens(sizes, agreeing, setting, heads=1)


def _write(
    config: BenchmarkConfig,
    name: str,
    title: str,
    rows: list[Row],
    over_tokens: list[Row],
    details: Row | None = None,
) -> dict[str, Any]:
    """Write a record and the plot of time and memory over tokens."""
    folder = config.out or RESULTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    slopes = {layer: speed.fit_slope(over_tokens, layer, "milliseconds") for layer in LAYERS}
    fitted = ", ".join(f"{layer} n^{slope:.2f}" for layer, slope in slopes.items())
    plot_cost(over_tokens, folder / f"{name}.png", slopes)
    return write_record(
        folder / f"{name}.json",
        title=f"{title}: time grows as {fitted}",
        command=f"python -m benchmarks.kernels {to_flags(config, without=['out'])}",
        rows=rows,
        device=config.device,
        details=details,
    )


def plot_cost(rows: Sequence[Row], path: Path, slopes: dict[str, float]) -> None:
    """Draw time and extra memory of one layer by number of tokens, both axes logarithmic.

    rows: dicts with `layer`, `tokens`, `milliseconds` and `extra_mb`.
    slopes: layer -> exponent of its time, for the legend.
    """
    figure = new_figure(9.0, 4.0)
    titles = {"milliseconds": "Time of one layer (ms)", "extra_mb": "Extra memory at its peak (MB)"}
    lines, tokens = group_rows(rows, "layer"), sorted({row["tokens"] for row in rows})
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        style_axes(axes, "tokens", "")
        exponents = {layer: f": tokens$^{{{slope:.2f}}}$" for layer, slope in slopes.items()}
        labels = {x: x + (exponents[x] if key == "milliseconds" else "") for x in slopes}
        drawn = {label: lines.get(layer, []) for layer, label in labels.items()}
        draw_lines(axes, drawn, "tokens", key)
        axes.set_xscale("log", base=2)
        # What a short video needs beyond its weights may be too little to be seen.
        if seen := [row[key] for row in rows if row[key] > 0]:
            is_narrow = key == "extra_mb" or max(seen) < 100 * min(seen)
            scale_by_decades(axes, (1, 2, 5) if is_narrow else (1,))
        axes.set_xticks(tokens, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in tokens])
        axes.legend(frameon=False, labelcolor=INK)
        title_axes(axes, title)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(BenchmarkConfig, argv, description=__doc__)
    record = run(config)
    for sentence in record.get("details", {}).get("left_out", []):
        sys.stdout.write(f"{sentence}\n")
    sys.stdout.write(f"\n{record['title']}\n\n{show_rows(record['rows'])}\n")
    sys.stdout.write(f"table and picture: {config.out or RESULTS_FOLDER}\n")
