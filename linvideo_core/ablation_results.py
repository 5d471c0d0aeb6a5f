"""From the rows of single runs to the tables of an ablation: means over seeds and their spread."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .tables import render_table

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
SPREAD = "_spread"


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
        if not all(_is_number(value) for value in values):
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
            {c: _with_spread(row, c) for c in _SHOWN if any(c in other for other in rows)}
            for row in rows
            if row["table"] == table
        ]
        parts.append(f"{table}\n\n{render_table(mine)}")
    return "\n".join(parts)


def _with_spread(row: Mapping[str, Any], column: str) -> Any:
    value, spread = row.get(column), row.get(column + SPREAD)
    if not spread:
        return value
    return f"{value:.4g} ± {spread:.2g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
