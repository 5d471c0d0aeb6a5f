"""Measured tables: one JSON file each in results/, and the command that shows them in the README.

    python -m linvideo_core.run.records               # write the tables between README's markers
    python -m linvideo_core.run.records --check       # only say whether README shows the records

A table stands between `<!-- record:NAME -->` and `<!-- /record -->`, NAME being results/NAME.json.
`<!-- record:NAME model=teacher|student steps=4 -->` shows only the rows with one of these values,
`columns=model|digit` only these columns, each with its spread over seeds where the record has one,
and `show=table` the table without the record's title and source. `what=PART` alone also names the
source of that part, in a record that several commands fill.
`<!-- record:NAME? -->` shows nothing as long as there is no such record.
"""

import dataclasses
import datetime
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .config import option, parse, run_command, to_json
from .files import write_json, write_text
from .tables import render_table, show_with_spread

REPOSITORY = Path(__file__).parents[2]
RESULTS_FOLDER = REPOSITORY / "results"
SOURCE = ("command", "date", "device", "versions")
KEYS = ("title", *SOURCE, "rows")

_MARKED = re.compile(
    r"(<!-- record:(\w+)(\??)((?: \w+=[\w.|-]+)*) -->\n)(.*?)(<!-- /record -->)", re.DOTALL
)
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
    details: Row | None = None,
) -> dict[str, Any]:
    """Write a measured table atomically, with today's date and the versions it was made with.

    command: what to type to measure it again.
    rows: of numbers, words, or lists of them; what is not finite is stored as null.
    details: what is worth keeping but not shown in a table.

    Returns the record.
    """
    record = {
        "title": title,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": describe_device(device),
        "versions": describe_versions(),
        "rows": [dict(row) for row in rows],
    }
    if details:
        record["details"] = dict(details)
    write_json(path, record)
    return record


def write_part(
    path: Path,
    part: str,
    *,
    title: str,
    command: str,
    rows: Sequence[Row],
    device: torch.device | str,
    details: Row | None = None,
) -> dict[str, Any]:
    """Write one command's rows of a record that several commands fill; the others' rows stay.

    part: the value of `what` that all these rows have, and no row of another command.

    `details` says of every part with which command, when and where it was measured, and holds its
    `details`; the record's own command is all of them, one after another.

    Returns the record.
    Raises ValueError where the others were measured on another device: one table would mix them.
    """
    parts, others = {}, []
    if path.is_file():
        earlier = read_record(path)
        parts = {k: v for k, v in _parts_of(earlier).items() if k != part}
        others = [row for row in earlier["rows"] if row.get("what") in parts]
    check_parts(path, device, without=part)
    parts[part] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": describe_device(device),
        "versions": describe_versions(),
        **(details or {}),
    }
    return write_record(
        path,
        title=title,
        command=" && ".join(dict.fromkeys(told["command"] for told in parts.values())),
        rows=[*others, *rows],
        device=device,
        details={"parts": parts},
    )


def check_parts(path: Path, device: torch.device | str, *, without: str = "") -> None:
    """Make sure that all parts of a record, if there is one, are of this device.

    without: a part that will be replaced as a whole.

    Raises ValueError, in one sentence, where one is of another: a table would mix them.
    """
    device_name = describe_device(device)
    for name, told in _parts_of(read_record(path) if path.is_file() else {}).items():
        if name != without and told["device"] != device_name:
            raise ValueError(
                f"{path} has rows of {name} measured on {told['device']}, and this is "
                f"{device_name}; write to another folder, or delete it and measure all here"
            )


def read_part(path: Path, part: str) -> dict[str, Any]:
    """Return what `write_part` keeps of a part beside its rows; nothing where there is none."""
    return _parts_of(read_record(path)).get(part, {}) if path.is_file() else {}


def _parts_of(record: Row) -> dict[str, Any]:
    return record.get("details", {}).get("parts", {})


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


def describe_versions() -> dict[str, str]:
    """Name the versions that a table is measured with here and now."""
    return {
        "linvideo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe_device(device: torch.device | str) -> str:
    """Name the device that a table was measured on."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def render_record(record: Mapping[str, Any], *, is_table_only: bool = False) -> str:
    """Turn a record into Markdown: its title, its table, and where the numbers come from."""
    if is_table_only:
        return render_table(record["rows"])
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
        opening, name, is_awaited, wanted, _, closing = match.groups()
        if is_awaited and not (results / f"{name}.json").exists():
            return f"{opening}{closing}"
        record = read_record(results / f"{name}.json")
        choices = _read_choices(wanted)
        columns, show = (choices.pop(key, None) for key in ("columns", "show"))
        record["rows"] = _select(record["rows"], choices, columns)
        if part := _parts_of(record).get("|".join(choices.get("what", []))):
            record |= {key: part[key] for key in SOURCE}
        return f"{opening}{render_record(record, is_table_only=show == ['table'])}{closing}"

    return _MARKED.sub(fill, text)


def _read_choices(wanted: str) -> dict[str, list[str]]:
    """Return what a marker says, "key=value|value" with spaces between, by key."""
    pairs = (each.partition("=") for each in wanted.split())
    return {key: values.split("|") for key, _, values in pairs}


def _select(
    rows: Sequence[Row], choices: Mapping[str, Sequence[str]], columns: Sequence[str] | None
) -> list[Row]:
    """Return the rows that have one of the values wanted under every key; of them these columns."""
    found = [row for row in rows if all(str(row.get(k)) in v for k, v in choices.items())]
    if columns is None:
        return found
    return [{column: show_with_spread(row, column) for column in columns} for row in found]


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


if __name__ == "__main__":
    run_command(main)
