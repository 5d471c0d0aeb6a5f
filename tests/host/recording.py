"""`--record-host PATH`: what ran in a real ComfyUI, as a record like those in results/.

    python -m pytest tests/host --record-host results/host.json

A test tells of a workflow that it ran with `tell_workflow`. Rows of another ComfyUI, or of another
device, stay as long as they are of this version of LinVideo; `details` says of each such run when
and with what it was measured. A run in which a host test failed writes nothing.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import SOURCE, describe_device, describe_versions, read_record
from linvideo_core.run.files import write_json
from tests.host.process import VARIABLE

TOLD = ("comfyui", "device", "workflow", "seconds")


def tell_workflow(
    record_property: Callable[[str, Any], None], server: Any, workflow: str, seconds: float
) -> None:
    """Tell the record of a workflow that a server has run."""
    for name, value in zip(TOLD, (server.version, server.device, workflow, seconds), strict=True):
        record_property(name, value)


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
        """Write the rows of this run beside those of other versions and devices."""
        counts = {"host_tests_passed": self.num_passed, "host_tests_skipped": self.num_skipped}
        rows = [{name: told[name] for name in TOLD} | counts for told in self.workflows]
        runs = {_run_of(row): self._describe(row["device"]) for row in rows}
        earlier, their_runs = _read_earlier(self.path)
        others = [row for row in earlier if _run_of(row) not in runs]
        runs = {name: their_runs[name] for name in map(_run_of, others)} | runs
        record = {"title": "Workflows in a real ComfyUI, and the tests that ran beside them"}
        record |= {key: _join(run[key] for run in runs.values()) for key in SOURCE}
        write_json(self.path, record | {"rows": others + rows, "details": {"runs": runs}})

    def _describe(self, device: str) -> dict[str, Any]:
        """Return when and with what rows of a device are measured now."""
        return {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            "device": describe_device("cpu") if device == "cpu" else device,
            "versions": describe_versions(),
        }


def _run_of(row: Mapping[str, Any]) -> str:
    return f"{row['comfyui']} on {row['device']}"


def _read_earlier(path: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the recorded rows of this version of LinVideo, and the run that each is of."""
    if not path.is_file():
        return [], {}
    record, ours = read_record(path), describe_versions()["linvideo"]
    runs = record["details"]["runs"]
    rows = [row for row in record["rows"] if runs[_run_of(row)]["versions"]["linvideo"] == ours]
    return rows, runs


def _join(values: Iterable[Any]) -> Any:
    """Return what several runs have in common, or all that they have: "/" stands between."""
    values = list(values)
    if isinstance(values[0], Mapping):
        return {name: _join(value[name] for value in values) for name in values[0]}
    return " / ".join(dict.fromkeys(values))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record-host`."""
    parser.addoption("--record-host", type=Path, help="write what ran in ComfyUI to this record")


def pytest_configure(config: pytest.Config) -> None:
    """Start recording when it is asked for."""
    if path := config.getoption("--record-host", None):
        arguments = " ".join(map(str, config.invocation_params.args))
        command = f"python -m pytest {arguments}"
        if (flags := os.environ.get(VARIABLE)) is not None:
            command = f'{VARIABLE}="{flags}" {command}'
        config.pluginmanager.register(HostRecord(path, command), "host-record")
