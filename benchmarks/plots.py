"""Plots of what a computation costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from linvideo_core.evaluate.plots import (
    INK,
    Row,
    draw_lines,
    group_rows,
    new_figure,
    save_figure,
    scale_by_decades,
    style_axes,
    title_axes,
)


def plot_cost(
    rows: Sequence[Row], path: Path, *, slopes: Mapping[str, float], what: str = "one layer"
) -> None:
    """Draw time and extra memory of `what` by number of tokens, both axes logarithmic.

    rows: dicts with `layer`, `tokens`, `milliseconds` and `extra_mb`.
    slopes: layer -> exponent of its time, for the legend.
    """
    figure = new_figure(9.0, 4.0)
    titles = {"milliseconds": f"Time of {what} (ms)", "extra_mb": "Extra memory at its peak (MB)"}
    lines = group_rows(rows, "layer")
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        style_axes(axes, "tokens", "")
        exponents = {layer: f": tokens$^{{{slope:.2f}}}$" for layer, slope in slopes.items()}
        draw_lines(
            axes,
            {
                layer + (exponents[layer] if key == "milliseconds" else ""): lines.get(layer, [])
                for layer in slopes
            },
            "tokens",
            key,
        )
        tokens = sorted({row["tokens"] for row in rows})
        axes.set_xscale("log", base=2)
        # What a short video needs beyond its weights may be too little to be seen.
        if seen := [row[key] for row in rows if row[key] > 0]:
            is_narrow = key == "extra_mb" or max(seen) < 100 * min(seen)
            scale_by_decades(axes, (1, 2, 5) if is_narrow else (1,))
        axes.set_xticks(tokens, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in tokens])
        axes.legend(frameon=False, labelcolor=INK)
        title_axes(axes, title)
    save_figure(figure, path)
