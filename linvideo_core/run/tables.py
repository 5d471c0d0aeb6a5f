"""Rows of measures as tables: Markdown for a page, columns for a terminal.

A measure and its spread over seeds are two columns of a row, NAME and NAME_spread.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

SPREAD = "_spread"

_LABELS = {
    "digit": "right digit (0 to 1)",
    "motion": "right motion (0 to 1)",
    "frechet": "Frechet to real clips",
    "seconds": "seconds of sampling",
    "frechet_to_teacher": "Frechet to teacher",
    "frechet_teacher_features": "same, on teacher features",
    "motion_energy": "motion energy / teacher's",
    "motion_ratio": "change per frame / teacher's",
    "spatial_spectrum_db": "spatial spectrum (dB off)",
    "temporal_spectrum_db": "temporal spectrum (dB off)",
    "diversity": "diversity / teacher's",
}


def format_value(value: Any) -> str:
    """Show a value as a reader wants it: three figures, thousands marked, a dash for none."""
    match value:
        case None:
            return "—"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return _format_float(value)
        case list() | tuple():
            return ", ".join(format_value(item) for item in value) or "—"
        case _:
            return str(value).replace("|", r"\|").replace("\n", " ")


def show_with_spread(row: Row, column: str) -> Any:
    """Return a column as "mean ± spread", the spread to two figures; as it is without a spread."""
    value, spread = row.get(column), row.get(column + SPREAD)
    return format_spread(value, spread) if spread and value is not None else value


def format_spread(value: float, spread: float) -> str:
    """Show a mean and its spread to the same decimals, four at most."""
    decimals = min(4, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else 0
    if spread <= 0 or not float(f"{spread:.{decimals}f}"):
        return format_value(value)
    return f"{value:,.{decimals}f} ± {spread:,.{decimals}f}"


def render_table(rows: Sequence[Row]) -> str:
    """Turn rows into a Markdown table whose columns are the rows' keys, in order of appearance."""
    if not rows:
        return "No rows.\n"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    is_number = [all(_is_figure(row.get(key)) for row in rows) for key in keys]
    lines = [
        [key.replace("_", " ") for key in keys],
        ["---:" if right else "---" for right in is_number],
        *([format_value(row.get(key)) for key in keys] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show_table(rows: Sequence[Row]) -> str:
    """Lay rows out for a terminal: a line a measure, a column a model."""
    names = [name for name in rows[0] if name != "model"]
    labels = {name: _LABELS.get(name, name.replace("_", " ")) for name in names}
    left = max(map(len, labels.values())) + 2
    widths = [max(12, len(row["model"]) + 2) for row in rows]
    columns = list(zip(rows, widths, strict=True))
    lines = [" " * left + "".join(f"{row['model']:>{width}}" for row, width in columns)]
    for name, label in labels.items():
        values = "".join(f"{format_value(row.get(name)):>{width}}" for row, width in columns)
        lines.append(f"{label:<{left}}{values}")
    return "\n".join(lines) + "\n"


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float | None) or (isinstance(value, str) and " ± " in value)


def _format_float(value: float) -> str:
    if not math.isfinite(value):
        return "—"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    # Three decimals below 1, so that fractions line up; three figures above.
    return f"{value:.3f}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")
