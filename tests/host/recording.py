"""`--record-host PATH`: what ran in a real ComfyUI, as a record like those in results/.

    python -m pytest tests/host --record-host results/host.json

A test tells of a workflow that it ran with `record_property`: "comfyui" (the version), "workflow"
(a name) and "seconds". Rows of another ComfyUI, recorded on the same day with the same versions,
stay; a run in which a host test failed writes nothing.
"""

import datetime
from pathlib import Path
from typing import Any

import pytest

from linvideo_core.records import describe_versions, read_record, write_record


class HostRecord:
    """Counts of host tests, and the workflows that they ran."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command
        self.num_passed = self.num_skipped = self.num_failed = 0
        self.workflows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test marked host once, by what became of it."""
        if "host" not in report.keywords:
            return
        self.num_failed += report.failed
        self.num_skipped += report.skipped
        if report.when == "call" and report.passed:
            self.num_passed += 1
            if "workflow" in (told := dict(report.user_properties)):
                self.workflows.append(told)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write the record, or say why not."""
        if self.num_failed:
            said = f"nothing recorded: {self.num_failed} host tests failed"
        elif not self.workflows:
            said = "nothing recorded: no workflow was run in a ComfyUI"
        else:
            self.write()
            said = f"recorded {len(self.workflows)} workflows in {self.path}"
        terminalreporter.write_line(f"host record: {said}")

    def write(self) -> None:
        """Write the rows of this run beside those of other ComfyUI versions."""
        counts = {"host_tests_passed": self.num_passed, "host_tests_skipped": self.num_skipped}
        rows = [
            {name: told[name] for name in ("comfyui", "workflow", "seconds")} | counts
            for told in self.workflows
        ]
        measured = {row["comfyui"] for row in rows}
        others = [row for row in self._rows_of_now() if row["comfyui"] not in measured]
        title = "Workflows in a real ComfyUI, and the tests that ran beside them"
        command, device = self.command, "cpu"
        write_record(self.path, title=title, command=command, rows=others + rows, device=device)

    def _rows_of_now(self) -> list[dict[str, Any]]:
        """Return the recorded rows for which date and versions of a new record are true, too."""
        if not self.path.is_file():
            return []
        record = read_record(self.path)
        today = datetime.date.today().isoformat()
        is_now = record["date"] == today and record["versions"] == describe_versions()
        return record["rows"] if is_now else []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record-host`."""
    parser.addoption("--record-host", type=Path, help="write what ran in ComfyUI to this record")


def pytest_configure(config: pytest.Config) -> None:
    """Start recording when it is asked for."""
    if path := config.getoption("--record-host", None):
        arguments = " ".join(map(str, config.invocation_params.args))
        record = HostRecord(path, f"python -m pytest {arguments}")
        config.pluginmanager.register(record, "host-record")
