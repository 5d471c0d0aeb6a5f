"""Rows of measures as a table for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

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
    "speedup": "speed / teacher's",
    "pixel_error": "pixel error (0 to 255)",
}
_KINDS = ("linear_layers", "hybrid_layers")


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
            return str(value).replace("\n", " ")


def show_table(rows: Sequence[Row]) -> str:
    """Lay rows out for a terminal: a line a measure, a column a model.

    Kinds of layers that no model has are left out.
    """
    absent = {name for name in _KINDS if not any(row.get(name) for row in rows)}
    names = [name for name in rows[0] if name not in {"model", *absent}]
    labels = {name: _LABELS.get(name, name.replace("_", " ")) for name in names}
    left = max(map(len, labels.values())) + 2
    widths = [max(12, len(row["model"]) + 2) for row in rows]
    columns = list(zip(rows, widths, strict=True))
    lines = [" " * left + "".join(f"{row['model']:>{width}}" for row, width in columns)]
    for name, label in labels.items():
        values = "".join(f"{format_value(row.get(name)):>{width}}" for row, width in columns)
        lines.append(f"{label:<{left}}{values}")
    return "\n".join(lines) + "\n"


def _format_float(value: float) -> str:
    if not math.isfinite(value):
        return "—"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    # Three decimals below 1, so that fractions line up; three figures above.
    return f"{value:.3f}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")
