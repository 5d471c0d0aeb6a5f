"""Measured tables: one JSON file each in results/, and the command that shows them in the README.

    python -m linvideo_core.records               # write the tables between README's markers
    python -m linvideo_core.records --check       # only say whether README shows the records

A table stands between `<!-- record:NAME -->` and `<!-- /record -->`, NAME being results/NAME.json.
"""

import dataclasses
import datetime
import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .config import option, parse, run_command, to_json
from .storage import write_text

REPOSITORY = Path(__file__).parent.parent
RESULTS_FOLDER = REPOSITORY / "results"
KEYS = ("title", "command", "date", "device", "versions", "rows")

_MARKED = re.compile(r"(<!-- record:(\w+) -->\n)(.*?)(<!-- /record -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- record:")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """Which page shows which records."""

    check: bool = option(False, "change nothing; exit with 1 if the page differs from the records")
    page: Path | None = option(None, "Markdown file with the markers; none: README.md")
    results: Path | None = option(None, "folder of the records; none: results")


def write_record(
    path: Path,
    *,
    title: str,
    command: str,
    rows: Sequence[Row],
    device: torch.device | str,
) -> dict[str, Any]:
    """Write a measured table atomically, with today's date and the versions it was made with.

    command: what to type to measure it again.
    rows: of numbers, words, or lists of them; what is not finite is stored as null.

    Returns the record.
    """
    record = {
        "title": title,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": describe_device(device),
        "versions": {
            "linvideo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "rows": [dict(row) for row in rows],
    }
    write_json(path, record)
    return record


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as indented JSON; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"record {path} does not exist; run the command that measures it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [key for key in KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{path} is not a record: it lacks {', '.join(missing)}")
    return record


def describe_device(device: torch.device | str) -> str:
    """Name the device that a table was measured on."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


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


def render_table(rows: Sequence[Row]) -> str:
    """Turn rows into a Markdown table whose columns are the rows' keys, in order of appearance."""
    if not rows:
        return "No rows.\n"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    is_number = [all(isinstance(r.get(k), int | float | None) for r in rows) for k in keys]
    lines = [
        [key.replace("_", " ") for key in keys],
        ["---:" if right else "---" for right in is_number],
        *([format_value(row.get(key)) for key in keys] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_record(record: Mapping[str, Any]) -> str:
    """Turn a record into Markdown: its title, its table, and where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    source = f"{record['device']}, {record['date']}, {versions}"
    return (
        f"**{record['title']}**\n\n{render_table(record['rows'])}\n"
        f"<sub>`{record['command']}` on {source}.</sub>\n"
    )


def render_page(text: str, results: Path) -> str:
    """Return a page's text with the records of a folder between its markers.

    Raises ValueError for a marker that does not close, FileNotFoundError for an unknown record.
    """
    if len(_OPENING.findall(text)) != len(_MARKED.findall(text)):
        raise ValueError(
            "a record's marker is not complete; write <!-- record:NAME --> and, on a line of its "
            "own, <!-- /record -->"
        )

    def fill(match: re.Match) -> str:
        opening, name, _, closing = match.groups()
        return f"{opening}{render_record(read_record(results / f'{name}.json'))}{closing}"

    return _MARKED.sub(fill, text)


def run(config: RecordsConfig) -> bool:
    """Bring the page up to date, or with `check` leave it; return whether it was up to date."""
    page = config.page or REPOSITORY / "README.md"
    if not page.is_file():
        raise FileNotFoundError(f"page {page} does not exist")
    text = page.read_text(encoding="utf-8")
    rendered = render_page(text, config.results or RESULTS_FOLDER)
    if rendered != text and not config.check:
        write_text(page, rendered)
    return rendered == text


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and render the records."""
    config, is_dry_run = parse(RecordsConfig, argv, description="Show the records in the README.")
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    is_current = run(config)
    if config.check and not is_current:
        raise SystemExit("the page differs from the records: run this command without --check")


def _format_float(value: float) -> str:
    if not math.isfinite(value):
        return "—"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    # Three decimals below 1, so that fractions line up; three figures above.
    return f"{value:.3f}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


if __name__ == "__main__":
    run_command(main)
