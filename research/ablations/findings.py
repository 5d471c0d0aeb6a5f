"""What an ablation found, asked by table and row: the door to its record for claims and plots."""

from collections.abc import Mapping
from typing import Any

from .results import Row, is_number


class Findings:
    """The rows of an ablation with the runs behind them.

    rows: one a row of a table; runs: one a run, by its folder; teacher, untrained: one a seed.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        """result: what ablation.json holds, or the record that was made of it."""
        parts = result.get("details", result)
        self.rows: dict[tuple[str, str], Row] = {
            (row["table"], row["name"]): row for row in result["rows"]
        }
        self.teacher: list[Row] = parts["teacher"]
        self.untrained: list[Row] = parts["untrained"]
        self.runs: dict[str, Row] = {run["run"]: run for run in parts["runs"]}
        self._members = {(m["table"], m["name"]): m["runs"] for m in parts["members"]}

    def names(self, table: str) -> list[str]:
        """Return a table's rows, as far as they were run, in the order of their declaration."""
        return [name for found, name in self.rows if found == table]

    def runs_of(self, table: str, name: str) -> list[Row]:
        """Return the finished runs of a row, one a seed; none of a row that was not run."""
        folders = self._members.get((table, name), [])
        found = [self.runs[folder] for folder in folders if folder in self.runs]
        return [run for run in found if "error" not in run]

    def num_failed(self, table: str, name: str) -> int:
        """Return how many seeds of a row diverged."""
        return self.rows.get((table, name), {}).get("failed", 0)

    def values(self, table: str, name: str, column: str) -> list[float]:
        """Return a measure of every finished seed; none where one of the seeds lacks it."""
        values = [run.get(column) for run in self.runs_of(table, name)]
        return values if all(is_number(value) for value in values) else []
