"""Plots of an ablation, every seed a dot: what was compared, what was chosen, what rounding costs.

All is drawn from the record alone, so a picture can be made again wherever the record is.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from linvideo_core.transfer.layer_selection.order import correlate

from linvideo_core.evaluate.plots import (
    COLOURS,
    Axes,
    Figure,
    new_figure,
    save_figure,
    style_axes,
    title_axes,
)
from linvideo_core.run.drawing import BLUE, INK, QUIET, VERMILION
from linvideo_core.run.tables import format_value

from .findings import Findings

_DOTTED = (0, (1, 3))
_SHARE = "Frechet to real clips over the teacher's own"
_EQUAL_STEPS = ("adm", "velocity", "adm_literal", "dmd")
_EQUAL_TIME = (
    "adm",
    "adm_after_velocity",
    "velocity_equal_time",
    "adm_even_levels",
    "velocity_even_levels",
    "adm_all_layers",
    "velocity_all_layers",
    "adm_maps_alone",
    "velocity_maps_alone",
)
_RANKINGS = {"replace-one": "replace_one", "restore-one": "restore_one"}


def plot_target(found: Findings, path: Path) -> bool:
    """Draw quality against the number of linear layers, the teacher at 1."""
    counts = sorted(int(name) for name in found.names("target") if found.runs_of("target", name))
    if not counts:
        return False
    panels = {
        "frechet_share": "Frechet, lower is better",
        "digit_share": "Right digit",
        "motion_share": "Right motion",
    }
    figure = new_figure(9.0, 3.6)
    for axes, (column, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        style_axes(axes, "linear layers", "over the teacher's" if column == "frechet_share" else "")
        axes.axhline(1, color=INK, linewidth=1.0, linestyle=_DOTTED)
        values = {n: v for n in counts if (v := found.values("target", str(n), column))}
        means = [statistics.fmean(v) for v in values.values()]
        axes.plot(list(values), means, color=BLUE, linewidth=1.8)
        for count, seeds in values.items():
            _scatter(axes, [count] * len(seeds), seeds, BLUE)
        axes.set_xticks(counts)
        axes.margins(x=0.08)
        if column != "frechet_share":
            low, _ = axes.get_ylim()
            axes.set_ylim(min(low, 0.95), 1 + 0.06 * (1 - min(low, 0.95)))
        title_axes(axes, title)
    save_figure(figure, path)
    return True


def plot_objective(found: Findings, path: Path) -> bool:
    """Draw the Frechet distance to the teacher by objective, at equal steps and at equal time."""
    table, column = "objective", "frechet_teacher"
    sides = [
        [name for name in names if name in found.names(table)]
        for names in (_EQUAL_STEPS, _EQUAL_TIME)
    ]
    if not all(any(found.values(table, name, column) for name in side) for side in sides):
        return False
    figure = new_figure(9.0, 0.55 * max(map(len, sides)) + 1.5)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, names, title in zip(panels, sides, ("Equal steps", "Equal time"), strict=True):
        style_axes(axes, "Frechet to the teacher, lower is better", "")
        for place, name in enumerate(names):
            _draw_row(axes, found, (table, name), column, place)
        _label_rows(axes, names)
        title_axes(axes, title)
    _scale_for_all(panels)
    save_figure(figure, path)
    return True


def plot_selection(found: Findings, path: Path) -> bool:
    """Draw quality by the rule that chose the layers, and beside it which ones each seed made."""
    table, column = "selection", "frechet_share"
    names = [name for name in found.names(table) if found.values(table, name, column)]
    if not names:
        return False
    names.sort(key=lambda name: statistics.fmean(found.values(table, name, column)))
    figure = new_figure(9.0, 0.5 * len(names) + 1.6)
    axes, matrix = figure.subplots(1, 2, width_ratios=(1, 0.8), sharey=True)
    style_axes(axes, f"{_SHARE}, lower is better", "")
    axes.axvline(1, color=INK, linewidth=1.0, linestyle=_DOTTED)
    for place, name in enumerate(names):
        _draw_row(axes, found, (table, name), column, place)
    _label_rows(axes, names)
    _scale_for_all([axes])
    title_axes(axes, "Quality, best first")
    _draw_choices(matrix, found, names)
    save_figure(figure, path)
    return True


def plot_order(found: Findings, path: Path) -> bool:
    """Draw how learned layer scores follow each ranking, and how the rankings follow each other."""
    errors = {
        kind: {run["seed"]: run["layer_errors"] for run in found.runs_of("selection", name)}
        for kind, name in _RANKINGS.items()
    }
    learned = {
        name: runs
        for name in found.names("selection")
        if (runs := [r for r in found.runs_of("selection", name) if "mean_scores" in r])
    }
    kinds = [kind for kind, seeds in errors.items() if seeds]
    if not kinds or not learned:
        return False
    figure = new_figure(9.0, 0.45 * len(learned) + 2.0)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        style_axes(axes, "rank correlation", "")
        for place, runs in enumerate(learned.values()):
            for scores, colour, label in (
                ("mean_scores", BLUE, "mean over the selection"),
                ("last_scores", VERMILION, "last before the choice"),
            ):
                values = [
                    correlate(*(dict(enumerate(side)) for side in (run[scores], order)), kind)
                    for run in runs
                    if (order := errors[kind].get(run["seed"]))
                ]
                shift = -0.13 if scores == "mean_scores" else 0.13
                _scatter(
                    axes, values, [place + shift] * len(values), colour, "" if place else label
                )
        axes.axvline(0, color=INK, linewidth=1.0, linestyle=_DOTTED)
        _label_rows(axes, list(learned))
        axes.set_xlim(-1.08, 1.08)
        title_axes(axes, f"Against {kind} ranking")
    _add_legend(figure, panels[0])
    save_figure(figure, path)
    return True


def plot_gap(found: Findings, path: Path) -> bool:
    """Draw what rounding the layer scores would cost, over the selection, a line a row."""
    rows = {
        name: runs
        for name in found.names("selection")
        if (runs := [r for r in found.runs_of("selection", name) if r.get("gap_course")])
    }
    if not rows:
        return False
    figure = new_figure(9.0, 4.4)
    panels = figure.subplots(1, 2)
    titles = {
        "gap_frechet": "Frechet, rounded over mixed, less 1",
        "score_distance": "How far scores are from 0 or 1",
    }
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        style_axes(axes, "training step", "")
        for i, (name, runs) in enumerate(rows.items()):
            colour, marker = COLOURS[i % len(COLOURS)], "osD^v"[i % 5]
            # Colours come round again sooner than rows end.
            dashes = "-" if i < len(COLOURS) else (0, (4, 2))
            steps = [point["step"] + 1 for point in runs[0]["gap_course"]]
            seeds = [[point.get(column) for point in run["gap_course"]] for run in runs]
            seeds = [line for line in seeds if None not in line]
            for line in seeds:
                axes.plot(steps, line, color=colour, linewidth=0.7, alpha=0.45)
            means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
            axes.plot(
                steps[: len(means)], means, color=colour, linewidth=1.8, linestyle=dashes,
                marker=marker, markersize=4.5, label=name.replace("_", " "),
            )  # fmt: skip
        axes.axhline(0, color=INK, linewidth=1.0, linestyle=_DOTTED)
        title_axes(axes, title)
    # Linear around 0, logarithmic beyond: early gaps are tens of times the last.
    panels[0].set_yscale("symlog", linthresh=0.1)
    low, high = panels[0].get_ylim()
    ticks = [-10, -1, -0.5, -0.1, -0.05, 0, 0.05, 0.1, 0.5, 1, 5, 10, 50, 100, 1000]
    panels[0].set_yticks([tick for tick in ticks if low <= tick <= high])
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylim(low, 1.2 * high)
    panels[0].axhline(0.05, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)))
    _add_legend(figure, panels[0])
    save_figure(figure, path)
    return True


def _draw_row(axes: Axes, found: Findings, row: tuple[str, str], column: str, place: int) -> None:
    """Draw the seeds of a row, their mean as a line with its number, and say which diverged."""
    values = found.values(*row, column)
    failed = found.num_failed(*row)
    text = f"{failed} of {failed + len(values)} diverged" if failed else ""
    style = {"va": "center", "color": VERMILION if failed else INK, "fontsize": 9}
    if not values:
        axes.annotate(text, (0.5, place), xycoords=("axes fraction", "data"), ha="center", **style)
        return
    _scatter(axes, values, _spread_out(place, len(values)), BLUE)
    mean = statistics.fmean(values)
    axes.plot([mean] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
    text = ", ".join(filter(None, (format_value(mean), text)))
    # Longer than a number, it stands on the side where there is room: bad rows are at the right.
    x, offset, side = (min(values), -9, "right") if failed else (max(values), 9, "left")
    axes.annotate(
        text, (x, place), xytext=(offset, 0), textcoords="offset points", ha=side, **style
    )


def _draw_choices(axes: Axes, found: Findings, names: Sequence[str]) -> None:
    """Draw a square for every layer of every seed, filled where it is linear."""
    runs = {name: found.runs_of("selection", name) for name in names}
    num_layers = max(max(run["layers"]) for mine in runs.values() for run in mine) + 1
    num_layers = max(num_layers, *(len(r.get("mean_scores", ())) for m in runs.values() for r in m))
    for place, mine in enumerate(runs.values()):
        places = _spread_out(place, len(mine))
        height = 0.8 * (places[1] - places[0]) if len(places) > 1 else 0.3
        for y, run in zip(places, mine, strict=True):
            for layer in range(num_layers):
                face = BLUE if layer in run["layers"] else "#ececec"
                axes.barh(y, 0.86, left=layer - 0.43, height=height, facecolor=face)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK, labelsize=9, labelleft=False)
    axes.set_xticks(range(num_layers))
    axes.set_xlabel("layer, a line a seed; filled: linear", color=INK, fontsize=11)
    title_axes(axes, "What was chosen")


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Name below all panels what one of them shows."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False,
        labelcolor=INK, fontsize=9,
    )  # fmt: skip


def _scatter(
    axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str = ""
) -> None:
    axes.scatter(x, y, s=30, color=colour, alpha=0.75, linewidths=0, zorder=3, label=label or None)


def _spread_out(place: int, count: int) -> list[float]:
    """Return places for the seeds of one row, so that equal values do not hide each other."""
    reach = 0.25 if count > 1 else 0.0
    return [place - reach + 2 * reach * i / max(1, count - 1) for i in range(count)]


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_words(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def _scale_for_all(panels: Sequence[Axes]) -> None:
    """Make a shared axis logarithmic where rows lie far apart; leave room for their numbers.

    Its numbers are written out: powers of ten are hard to compare.
    """
    axes = panels[0]
    low, high = (f(p.dataLim.intervalx[i] for p in panels) for i, f in enumerate((min, max)))
    if not 0 < 4 * low < high:
        axes.margins(x=0.15)
        return
    axes.set_xscale("log")
    digits = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in digits]
    low, high = low * (low / high) ** 0.06, high * (high / low) ** 0.15
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low, high)
    for panel in panels:
        panel.tick_params(axis="x", which="minor", labelbottom=False)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words if len(words) <= 26 else words.replace(" without", "\nwithout")
