"""Tables of the experiments: means over seeds, paired tests in every measure, and how many."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.record import show_rows

from ..declared_runs import summarize
from ..paired import compare_measures, least_p, to_columns
from .arms import NOT_RUN, TABLES
from .judge import QUESTIONS

Row = dict[str, Any]

MEASURES = (
    *QUESTIONS,
    "found",
    "recall",
    "position_error",
    "speed_error",
    "unpaired_frechet",
    "frechet_real",
    "temporal_spectrum_db",
    "diversity",
    "fidelity",
    "paired_frechet",
)
"""What an arm is compared with its baseline in; see `research.crowd.evaluate` for each."""

_KEYS = ("table", "name", "num_frames")
_SHOWN = ("unpaired_frechet", "floor", "recall", "position_error", "fidelity", "seconds_per_video")
_TESTED = ("unpaired_frechet", "recall", "position_error", "fidelity")


def tabulate(rows: Sequence[Row], table: str) -> list[Row]:
    """Return a table's rows, one an arm and number of frames: means over seeds, and paired tests.

    They are in the order in which arms are declared. Where an arm has a baseline, each measure has
    its `_difference` from that, with `_t` and `_p`; see `research.paired`.

    rows: of all tables, one an arm and seed.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["table"] == table:
            groups.setdefault((row["name"], row["num_frames"]), []).append(row)
    found, arms = [], TABLES.get(table, {})
    declared = [(name, n) for name, arm in arms.items() for n in arm.num_frames]
    places = {key: place for place, key in enumerate(declared)}
    for key in sorted(groups, key=lambda key: places.get(key, len(places))):
        (name, num_frames), runs, arm = key, groups[key], arms.get(key[0])
        measured = [{k: v for k, v in run.items() if k not in _KEYS} for run in runs]
        row = {"what": table, "name": name, "num_frames": num_frames, **summarize(measured)}
        if arm is not None and arm.baseline is not None:
            row["baseline"] = arm.baseline
            baseline = groups.get((arm.baseline, num_frames), [])
            row |= to_columns(compare_measures(runs, baseline, {m: m for m in MEASURES}))
        found.append(row)
    return found


def count_tests(rows: Sequence[Row]) -> dict[str, int]:
    """Return how many measures, comparisons of two arms, and tests a table's rows hold."""
    compared = [{m for m in MEASURES if f"{m}_p" in row} for row in rows]
    return {
        "measures": len(set().union(*compared)),
        "comparisons": sum(map(bool, compared)),
        "tests": sum(map(len, compared)),
    }


def describe_tests(rows: Sequence[Row]) -> str:
    """Say how much a table's rows were looked at, in one sentence."""
    counts, seeds = count_tests(rows), max(row["seeds"] for row in rows)
    if not counts["tests"]:
        return "No arm was compared with a baseline."
    return (
        f"{counts['tests']} paired tests were looked at, {counts['measures']} measures in "
        f"{counts['comparisons']} comparisons of two arms, of {seeds} seeds at most; p is of the "
        f"exact sign-flip test, at least {least_p(seeds):.3g} with so many seeds, and is corrected "
        "for nothing."
    )


def show(table: str, rows: Sequence[Row], references: Sequence[Row]) -> str:
    """Lay a table out for a terminal: means, tests of a few measures, what was not run.

    references: rows of the teacher and of rendered clips.
    """
    columns = ("name", "num_frames", "seeds", "failed", "steps", *_SHOWN)
    sizes = {row["num_frames"] for row in rows}
    shown = [row for row in references if row["num_frames"] in sizes]
    means = [{name: row.get(name) for name in columns} for row in [*shown, *rows]]
    tests = [
        {"name": row["name"], "num_frames": row["num_frames"], "less": row["baseline"]}
        | {measure: _show_test(row, measure) for measure in _TESTED}
        for row in rows
        if "baseline" in row
    ]
    parts = [f"{table}\n", show_rows(means)]
    if tests:
        parts.append("\ndifference from the baseline (t, p), seed by seed\n" + show_rows(tests))
    parts.append(f"{describe_tests(rows)}\n")
    parts += [f"not run: {name}: {why}\n" for name, why in NOT_RUN.get(table, {}).items()]
    return "".join(parts)


def _show_test(row: Mapping[str, Any], measure: str) -> str:
    if f"{measure}_p" not in row:
        return "-"
    t = row[f"{measure}_t"]
    return f"{row[f'{measure}_difference']:+.3g} ({'-' if t is None else f'{t:.1f}'}, " + (
        f"{row[f'{measure}_p']:.3f})"
    )
