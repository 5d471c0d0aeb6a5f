"""From the rows of single runs to the tables of an ablation: means over seeds and their spread."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from linvideo_core.run.tables import SPREAD, render_table, show_with_spread

Row = dict[str, Any]

_LEADING = ("table", "name", "seeds", "digit", "motion", "frechet", "frechet_teacher", "seconds")
_SHOWN = (
    "name",
    "seeds",
    "digit",
    "motion",
    "frechet",
    "frechet_share",
    "frechet_teacher",
    "gap_frechet",
    "steps",
    "seconds",
    "bytes",
    "error",
)


def share_of_teacher(row: Row, teacher: Row) -> Row:
    """Return a student's measures over its teacher's own on the same bench, as `*_share`."""
    return {
        f"{name}_share": row[name] / teacher[name]
        for name in ("digit", "motion", "frechet")
        if row.get(name) is not None and teacher.get(name)
    }


def summarize(table: str, name: str, runs: Sequence[Row]) -> Row:
    """Return the row of a table: the mean over the finished seeds, and the spread, of every number.

    runs: one a seed, each with measures or with an `error`. `seeds` counts those with measures,
    `failed` the others. A measure that one of the seeds lacks, or that is not finite there, is left
    out: a mean over the rest would look better than the row is. The spread is the sample standard
    deviation.
    """
    whole = [run for run in runs if "error" not in run]
    row: Row = {"table": table, "name": name, "seeds": len(whole)}
    if errors := [run["error"] for run in runs if "error" in run]:
        row |= {"failed": len(errors), "error": errors[0]}
    columns = dict.fromkeys(column for run in whole for column in run if column != "seed")
    for column in sorted(columns, key=lambda c: _LEADING.index(c) if c in _LEADING else math.inf):
        values = [run.get(column) for run in whole]
        if not all(is_number(value) for value in values):
            continue
        row[column] = statistics.fmean(values)
        if len(values) > 1:
            row[column + SPREAD] = statistics.stdev(values)
    return row


def show_tables(rows: Sequence[Row]) -> str:
    """Lay the rows out table by table, the main columns alone."""
    tables = dict.fromkeys(row["table"] for row in rows)
    parts = []
    for table in tables:
        mine = [
            {c: show_with_spread(row, c) for c in _SHOWN if any(c in other for other in rows)}
            for row in rows
            if row["table"] == table
        ]
        parts.append(f"{table}\n\n{render_table(mine)}")
    return "\n".join(parts)


def is_outside_spread(lower: Sequence[float], higher: Sequence[float]) -> bool:
    """Say whether one row lies below another by more than their seeds explain.

    The means differ by more than the sum of both sample standard deviations, and no seed of one
    lies among the other's. With three seeds each the first is a t of 2.4 or more (equal spreads: p
    below 0.04, one-sided), and the second happens by chance once in twenty times.

    Raises ValueError for fewer than two seeds of either, which have no spread.
    """
    if min(len(lower), len(higher)) < 2:
        raise ValueError(f"{len(lower)} and {len(higher)} seeds given; a spread needs 2 of each")
    spread = statistics.stdev(lower) + statistics.stdev(higher)
    is_far = statistics.fmean(higher) - statistics.fmean(lower) > spread
    return is_far and max(lower) < min(higher)


def is_below_by_own_spread(lower: Sequence[float], value: float) -> bool:
    """Say whether every seed, and the mean by more than their spread, lies below one value.

    For a value that is no mean, as the median of random choices, whose own spread is not one of
    seeds.
    """
    if len(lower) < 2:
        raise ValueError(f"{len(lower)} seed given; a spread needs 2")
    return max(lower) < value and value - statistics.fmean(lower) > statistics.stdev(lower)


def is_number(value: Any) -> bool:
    """Say whether a measure is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
