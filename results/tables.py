"""Tables of the records in this folder, for cog to write into Markdown.

    cog -r -P -I . -p "from results.tables import show" *.md docs/*.md

runs the calls of `show` in the pages, `<!-- [[[cog show("cost_cpu") ]]] -->`, and puts what they
print before `<!-- [[[end]]] -->`. With `--check` in place of `-r` it says which page is stale.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tabulate import tabulate

from linvideo_core.run.tables import format_value

FOLDER = Path(__file__).parent
SPREAD = "_spread"

Row = Mapping[str, Any]
EVERY: Row = MappingProxyType({})


def show(name: str, columns: str = "", *, rows: Row = EVERY, is_bare: bool = False) -> None:
    """Print a record's table as Markdown, with its title and where its numbers come from.

    name: of a JSON file in this folder.
    columns: names with spaces between; "": all. Each stands with its spread, where it has one.
    rows: {"field": value or list of values}: only rows with one of these in every field named.
    is_bare: without title and source.
    """
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    chosen = [row for row in record["rows"] if _matches(row, rows)]
    table = render(chosen, columns.split() or dict.fromkeys(key for row in chosen for key in row))
    part = record.get("details", {}).get("parts", {}).get(str(rows.get("what")), {})
    text = table if is_bare else f"**{record['title']}**\n\n{table}\n\n{source(record | part)}"
    sys.stdout.write(f"{text}\n")


def source(record: Row) -> str:
    """Return the line below a table: command, device, date and versions.

    A record, or a part of it, whose command has gone since says so in its `command_note`.
    """
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    command = f"`{record['command']}`"
    if note := record.get("command_note"):
        command = f"{command} ({note})"
    return f"<sub>{command} on {record['device']}, {record['date']}, {versions}.</sub>"


def render(rows: Sequence[Row], columns: Iterable[str]) -> str:
    """Return rows as a Markdown table of these columns."""
    cells = {name: [cell(row, name) for row in rows] for name in columns}
    alignment = ["right" if _is_numeric(rows, name) else "left" for name in cells]
    table = {name.replace("_", " "): shown for name, shown in cells.items()}
    return tabulate(table, "keys", "pipe", disable_numparse=True, colalign=alignment)


def cell(row: Row, name: str) -> str:
    """Return a value as it is shown: three figures, or as "mean ± spread"."""
    value, spread = row.get(name), row.get(name + SPREAD)
    if not spread or value is None:
        return format_value(value).replace("|", r"\|")
    # The spread to two figures, both to the same decimals, four at most.
    decimals = min(4, max(0, 1 - math.floor(math.log10(spread))))
    if not float(f"{spread:.{decimals}f}"):
        return format_value(value)
    return f"{value:,.{decimals}f} ± {spread:,.{decimals}f}"


def _matches(row: Row, wanted: Row) -> bool:
    return all(
        row.get(field) in (values if isinstance(values, list) else [values])
        for field, values in wanted.items()
    )


def _is_numeric(rows: Sequence[Row], name: str) -> bool:
    return all(isinstance(row.get(name), int | float | None) for row in rows)
