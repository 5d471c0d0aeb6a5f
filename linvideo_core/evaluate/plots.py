"""Plots of layer scores, losses, velocity errors and quality by steps.

matplotlib's global state is never touched, so a host may draw for itself. Colours are those of
Okabe and Ito, which colour-blind readers tell apart.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..artifact.summary import BLUE, INK, PAPER, QUIET, VERMILION
from ..run.files import replacing

Row = Mapping[str, Any]

COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
"""DejaVu Sans, which matplotlib carries on every system."""
_DPI = 150
_DOTTED = {"color": QUIET, "linewidth": 0.8, "linestyle": (0, (1, 3))}


def plot_layer_scores(
    rows: Sequence[Row],
    path: Path,
    *,
    layers: Sequence[int] | None = None,
    hardened_at: int | None = None,
    kind: str = "linear",
) -> None:
    """Draw every layer's score r over training, coloured by depth, the linear layers in bold.

    rows: from metrics.jsonl, with `step` and `layer_scores`; others are passed over.
    layers: the linear layers; none: those whose last score is below one half.
    hardened_at: the step from which the rounded choice was trained. kind: of `LinearForm`.

    Raises ValueError when no row has layer scores.
    """
    rows = [row for row in rows if row.get("layer_scores")]
    if not rows:
        raise ValueError("no layer scores were recorded, so there is nothing to plot")
    steps = [row["step"] for row in rows]
    scores = np.array([row["layer_scores"] for row in rows], dtype=float)
    is_linear = scores[-1] < 0.5
    if layers is not None:
        is_linear = np.isin(np.arange(scores.shape[1]), list(layers))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(is_linear)))
    figure = new_figure(9.0, 4.6)
    axes, legend = figure.subplots(1, 2, width_ratios=(1, 0.09))
    style_axes(axes, "training step", "layer score r")
    for layer, colour in enumerate(colours):
        width, alpha = (2.0, 1.0) if is_linear[layer] else (0.9, 0.55)
        axes.plot(steps, scores[:, layer], color=colour, linewidth=width, alpha=alpha)
    axes.axhline(0.5, **_DOTTED)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], [f"0  {kind}", "0.25", "0.5", "0.75", "1  softmax"])
    if hardened_at is not None:
        axes.axvline(hardened_at, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            "hardened", (hardened_at, 0.5), xycoords=("data", "axes fraction"), xytext=(5, 6),
            textcoords="offset points", rotation=90, va="bottom", color=INK, fontsize=10,
        )  # fmt: skip
    count, total = int(is_linear.sum()), len(is_linear)
    title_axes(axes, f"{count} of {total} layers are {kind}")
    _draw_layers(legend, is_linear, colours, kind)
    save_figure(figure, path)


def plot_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss over training, smoothed above its raw values, and its `*_loss` terms.

    rows: from metrics.jsonl, with `step` and `loss`. Where terms take turns, as a critic and what
    it judges do, the terms alone are drawn: their sum is another one at every step.

    Raises ValueError when no row has a loss.
    """
    rows = [row for row in rows if row.get("loss") is not None]
    if not rows:
        raise ValueError("no losses were recorded, so there is nothing to plot")
    names = [n for n in dict.fromkeys(k for r in rows for k in r) if n.endswith("_loss")]
    figure = new_figure(9.0, 4.6)
    axes = figure.subplots()
    style_axes(axes, "training step", "loss")
    seen: list[float] = []
    drawn = names if any(_takes_turns(rows, name) for name in names) else ["loss", *names]
    for i, name in enumerate(drawn):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        steps, values = np.array(points, dtype=float).T
        colour, smooth = COLOURS[i % len(COLOURS)], _smooth(values)
        if name == "loss":
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name.replace("_", " "))
        seen += values.tolist()
    if 0 < 10 * min(seen) < max(seen):
        scale_by_decades(axes)
    if names:
        axes.legend(frameon=False, labelcolor=INK)
    title_axes(axes, "Loss")
    save_figure(figure, path)


def scale_by_decades(axes: Axes, digits: Sequence[int] = (1, 2, 5)) -> None:
    """Make the value axis logarithmic, with plain numbers at these digits of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _takes_turns(rows: Sequence[Row], name: str) -> bool:
    has = [row.get(name) is not None for row in rows]
    return sum(one != next_one for one, next_one in itertools.pairwise(has)) > 1


def plot_velocity_error(rows: Sequence[Row], path: Path) -> None:
    """Draw the velocity's relative error and cosine by noise level, a line for each model.

    rows: dicts with `model`, `sigma`, `velocity_error` and `velocity_cosine`.
    """
    if not rows:
        raise ValueError("no velocity errors were measured, so there is nothing to plot")
    figure = new_figure(9.0, 4.0)
    panels = figure.subplots(1, 2)
    titles = {
        "velocity_error": r"Velocity error  $\|u - v\| \,/\, \|v\|$",
        "velocity_cosine": "Cosine to the teacher's velocity",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        style_axes(axes, r"noise level $\sigma$  (sampling runs to the right)", "")
        draw_lines(axes, group_rows(rows, "model"), "sigma", key)
        axes.set_xlim(1.03, -0.03)
        title_axes(axes, title)
    panels[0].set_ylim(bottom=0)
    low = min(panels[1].get_ylim()[0], 0.9)
    panels[1].set_ylim(low, 1 + 0.04 * (1 - low))
    panels[1].axhline(1, **_DOTTED)
    panels[0].legend(frameon=False, labelcolor=INK)
    save_figure(figure, path)


def plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Draw quality by number of sampling steps: a line for each model, a point where it has one.

    rows: dicts with `model`, `steps` and measures; models whose names differ only in their steps
        ("teacher", "teacher_8_plain") make one line. Measures that no row has are left out.
    """
    titles = {
        "frechet": "Frechet distance to real clips",
        "frechet_teacher_features": "Frechet distance on teacher features",
        "digit": "Right digit (share of samples)",
        "motion_energy": "Speed / the teacher's",
        "diversity": "Diversity / the teacher's",
    }
    titles = {k: v for k, v in titles.items() if any(row.get(k) is not None for row in rows)}
    if "frechet" in titles:
        titles.pop("frechet_teacher_features", None)
    if not titles:
        raise ValueError("no measure by number of steps was taken, so there is nothing to plot")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = row["model"].removesuffix("_plain").removesuffix(f"_{row['steps']}")
        lines.setdefault(name.replace("_", " "), []).append(row)
    figure = new_figure(4.2 * len(titles), 4.0)
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        style_axes(axes, "sampling steps", "")
        draw_lines(axes, lines, "steps", key)
        steps = sorted({row["steps"] for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.xaxis.set_minor_formatter(NullFormatter())
        values = [row.get(key) or 0 for row in rows]
        # Only where there are decades: over less the axis would have hardly a number.
        if key.startswith("frechet") and 0 < 10 * min(values) < max(values):
            scale_by_decades(axes)
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        title_axes(axes, title)
    panels[0].legend(frameon=False, labelcolor=INK)
    save_figure(figure, path)


def group_rows(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Return rows by their value of a key."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def draw_lines(axes: Axes, lines: Mapping[str, Sequence[Row]], x: str, y: str) -> None:
    """Draw a line with markers for each label, through its rows that have a y."""
    for i, (label, rows) in enumerate(lines.items()):
        points = sorted((row[x], row[y]) for row in rows if row.get(y) is not None)
        axes.plot(
            [at for at, _ in points], [value for _, value in points], label=label,
            color=COLOURS[i % len(COLOURS)], marker="osD^v"[i % 5], markersize=5, linewidth=1.8,
        )  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches, whose parts find their places themselves."""
    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)
    return figure


def style_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Give axes the house's looks and their labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK, fontsize=11)
    axes.set_ylabel(y_label, color=INK, fontsize=11)


def title_axes(axes: Axes, text: str) -> None:
    """Write a panel's title, above its left edge."""
    axes.set_title(text, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)


def _draw_layers(axes: Axes, is_linear: np.ndarray, colours: np.ndarray, kind: str) -> None:
    """Draw a square for each layer, first on top, filled where it is linear: the legend."""
    count = len(is_linear)
    faces = colours * [1, 1, 1, 0]
    faces[is_linear] = colours[is_linear]
    axes.barh(range(count), 1, height=0.72, color=faces, edgecolor=colours, linewidth=1.2)
    axes.set_yticks(range(0, count, 1 if count <= 20 else 5))
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, 1.04)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title("layer", loc="left", color=INK, fontsize=10, pad=12)
    axes.set_xlabel(f"filled:\n{kind}", color=INK, fontsize=9)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over about a fiftieth of the run, exponentially, without a bias at its start."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    smooth = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        smooth[i] = total / weight
    return smooth


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
