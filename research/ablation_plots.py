"""Draw evidence.json and hybrid.json, every seed a dot: `python -m research.ablation_plots`."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS_FOLDER, read_part, read_record
from linvideo_core.evaluate.plots import (
    BLUE,
    COLOURS,
    INK,
    VERMILION,
    Axes,
    new_figure,
    save_figure,
    style_axes,
    title_axes,
)
from linvideo_core.run.config import option, parse, run_command
from linvideo_core.run.tables import format_value

_DOTTED = (0, (1, 3))
_EQUAL_STEPS = ("adm", "velocity", "adm_literal", "dmd")
_UNTRAINED = {"sol_attn": "Sol-Attn", "pisa": "PISA", "pisa_blocks": "PISA, a covariance a block"}
_TRAINED = {
    "linear": "linear",
    "query": "hybrid, query",
    "moments": "hybrid, moments",
    "window": "window of a frame",
    "sla": "SLA",
}
"""Form of results/hybrid.json -> its label; other forms are not drawn."""


class Seeds:
    """The runs behind the rows of a record."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        details = record["details"]
        self._runs = {run["run"]: run for run in details["runs"]}
        self._members = {(m["table"], m["name"]): m["runs"] for m in details["members"]}

    def names(self, table: str) -> list[str]:
        """Return the rows of a table."""
        return [name for found, name in self._members if found == table]

    def values(self, table: str, name: str, column: str) -> list[Any]:
        """Return a measure of every seed that has finished."""
        runs = [self._runs.get(key, {}) for key in self._members[table, name]]
        return [run[column] for run in runs if run.get(column) is not None]

    def count_failed(self, table: str, name: str) -> int:
        """Return how many seeds of a row diverged."""
        return sum("error" in self._runs.get(key, {}) for key in self._members[table, name])


def plot_target(seeds: Seeds, path: Path) -> None:
    """Draw quality against the number of linear layers, the teacher at 1."""
    counts = sorted(map(int, seeds.names("target")))
    panels = {
        "frechet_share": "Frechet, lower is better",
        "digit_share": "Right digit",
        "motion_share": "Right motion",
    }
    figure = new_figure(9.0, 3.6)
    for axes, (column, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        style_axes(axes, "linear layers", "over the teacher's" if column == "frechet_share" else "")
        axes.axhline(1, color=INK, linewidth=1.0, linestyle=_DOTTED)
        values = {n: v for n in counts if (v := seeds.values("target", str(n), column))}
        axes.plot(list(values), list(map(statistics.fmean, values.values())), color=BLUE)
        for count, mine in values.items():
            axes.scatter([count] * len(mine), mine, s=30, color=BLUE, alpha=0.75, linewidths=0)
        axes.set_xticks(counts)
        title_axes(axes, title)
    save_figure(figure, path)


def plot_objective(seeds: Seeds, path: Path) -> None:
    """Draw the Frechet distance to the teacher by objective, at equal steps and at equal time."""
    names = seeds.names("objective")
    sides = {
        "Equal steps": [name for name in names if name in _EQUAL_STEPS],
        "Equal time": [name for name in names if name == "adm" or name not in _EQUAL_STEPS],
    }
    figure = new_figure(9.0, 0.55 * max(map(len, sides.values())) + 1.5)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, (title, mine) in zip(panels, sides.items(), strict=True):
        draw_rows(axes, seeds, "objective", mine, "frechet_teacher")
        axes.set_xlabel("Frechet to the teacher, lower is better")
        axes.set_xscale("log")
        title_axes(axes, title)
    save_figure(figure, path)


def plot_selection(seeds: Seeds, path: Path) -> None:
    """Draw quality by the rule that chose the layers, and beside it which ones each seed made."""
    column = "frechet_share"
    names = [name for name in seeds.names("selection") if seeds.values("selection", name, column)]
    names.sort(key=lambda name: statistics.fmean(seeds.values("selection", name, column)))
    figure = new_figure(9.0, 0.5 * len(names) + 1.6)
    axes, matrix = figure.subplots(1, 2, width_ratios=(1, 0.8), sharey=True)
    draw_rows(axes, seeds, "selection", names, column)
    axes.axvline(1, color=INK, linewidth=1.0, linestyle=_DOTTED)
    axes.set_xscale("log")
    axes.set_xlabel("Frechet over the teacher's own")
    title_axes(axes, "Quality, best first")
    for place, name in enumerate(names):
        chosen = seeds.values("selection", name, "layers")
        for y, layers in zip(spread_out(place, len(chosen)), chosen, strict=True):
            matrix.barh(
                [y] * len(layers), 0.86, left=[i - 0.43 for i in layers], height=0.2, color=BLUE
            )
    matrix.set_xlabel("linear layers, a line a seed")
    title_axes(matrix, "What was chosen")
    save_figure(figure, path)


def draw_rows(axes: Axes, seeds: Seeds, table: str, names: Sequence[str], column: str) -> None:
    """Draw a line of dots a row, their mean with its number, and how many seeds diverged."""
    style_axes(axes, "", "")
    for place, name in enumerate(names):
        values, failed = seeds.values(table, name, column), seeds.count_failed(table, name)
        text = [f"{failed} diverged"] if failed else []
        if values:
            mean = statistics.fmean(values)
            axes.scatter(values, spread_out(place, len(values)), s=30, color=BLUE, alpha=0.75)
            axes.plot([mean] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
            text = [format_value(mean), *text]
        axes.annotate(
            ", ".join(text),
            (max(values, default=1.0), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=VERMILION if failed else INK,
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)


def spread_out(place: int, count: int) -> list[float]:
    """Return places for the seeds of one row, so that equal values do not hide each other."""
    return [place - 0.25 + 0.5 * i / max(1, count - 1) for i in range(count)]


def plot_hybrid(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the distance to the teacher against the share of softmax that is computed.

    runs: of the record's `details`, of all seeds, with `form`, `tile`, `cost` and `frechet`.
    """
    figure = new_figure(9.0, 4.6)
    axes = figure.subplots()
    style_axes(axes, "share of pairs of tokens that softmax sees", "Frechet to the teacher")
    styles = {"without training": (_UNTRAINED, "s", "--"), "trained": (_TRAINED, "o", "")}
    for suffix, (labels, marker, line) in styles.items():
        for (form, label), colour in zip(labels.items(), COLOURS, strict=False):
            mine = [run for run in runs if run["form"] == form and "shifted" not in run["tile"]]
            distances: dict[float, list[float]] = {}
            for run in mine:
                distances.setdefault(run["cost"], []).append(run["frechet"])
            means = list(map(statistics.fmean, distances.values()))
            name, looks = f"{label}, {suffix}", {"color": colour, "linestyle": line}
            axes.plot([*distances], means, marker=marker, markersize=7, label=name, **looks)
            for cost, values in distances.items():
                axes.plot([cost] * len(values), values, "_", color=colour, markersize=12)
    axes.set_yscale("log")
    axes.set_yticks([0.3, 0.5, 1, 3, 10], ["0.3", "0.5", "1", "3", "10"])
    axes.set_ylim(top=100)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    title_axes(axes, "All ten layers, 448 tokens, a dash a seed: lower is better")
    save_figure(figure, path)


DRAWERS = {"target": plot_target, "objective": plot_objective, "selection": plot_selection}


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the tables that a record has as evidence_*.png; return the files."""
    seeds = Seeds(record)
    paths = {name: folder / f"evidence_{name}.png" for name in DRAWERS if seeds.names(name)}
    for name, path in paths.items():
        DRAWERS[name](seeds, path)
    return list(paths.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotsConfig:
    """Where the pictures go."""

    out: Path = option(RESULTS_FOLDER, "folder of the pictures, which are replaced")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    config = parse(PlotsConfig, argv, description=__doc__)
    _, forms = read_part(RESULTS_FOLDER / "hybrid.json", "forms")
    draw(read_record(RESULTS_FOLDER / "evidence.json"), config.out)
    plot_hybrid(forms["runs"], config.out / "hybrid.png")


if __name__ == "__main__":
    run_command(main)
