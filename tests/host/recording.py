"""`--record-host PATH`: what ran in a real ComfyUI, as a record like those in results/.

    python -m pytest tests/host --record-host results/host.json

A test tells of a workflow that it ran with `tell_workflow`. A run has one row of tests, which says
what they ran with, and a row for each workflow. Rows of another ComfyUI, or of another device,
stay; `details` says of each run when and with what it was measured. A run in which a host test
failed writes nothing.
"""

import datetime
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import SOURCE, describe_device, describe_versions, read_record
from linvideo_core.run.files import write_json
from tests.host.process import VARIABLE

RAN_WITH = ("comfyui", "device", "torch", "triton", "linear_layers")
WORKFLOW = ("comfyui", "device", "workflow", "seconds")


def tell_workflow(
    record_property: Callable[[str, Any], None], server: Any, workflow: str, seconds: float
) -> None:
    """Tell the record of a workflow that a server has run."""
    told = {"comfyui": server.version, "device": server.device, **server.host.described}
    told |= {"workflow": workflow, "seconds": seconds}
    for name in dict.fromkeys(RAN_WITH + WORKFLOW):
        record_property(name, told[name])


class HostRecord:
    """Counts of host tests, and the workflows that they ran."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.workflows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test marked host once, by what became of it."""
        if "host" not in report.keywords:
            return
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if "workflow" in (told := dict(report.user_properties)) and report.when == "call":
            self.workflows.append(told)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write the record, or say why not."""
        if failed := self.counts["failed"]:
            said = f"nothing recorded: {failed} host tests failed"
        elif not self.workflows:
            said = "nothing recorded: no workflow was run in a ComfyUI"
        else:
            self.write()
            said = f"recorded {len(self.workflows)} workflows in {self.path}"
        terminalreporter.write_line(f"host record: {said}")

    def write(self) -> None:
        """Write the rows of this run beside those of other versions and devices."""
        run, *_ = self.workflows
        rows = [{name: run[name] for name in RAN_WITH} | self.counts]
        rows += [{name: told[name] for name in WORKFLOW} for told in self.workflows]
        earlier = read_record(self.path) if self.path.is_file() else {"rows": []}
        rows = [row for row in earlier["rows"] if _run_of(row) != _run_of(run)] + rows
        known = earlier.get("details", {}).get("runs", {}) | {_run_of(run): self._describe(run)}
        runs = {name: known[name] for name in map(_run_of, rows)}
        record = {"title": "Tests and workflows in a real ComfyUI"}
        record |= {key: _join(each[key] for each in runs.values()) for key in SOURCE}
        write_json(self.path, record | {"rows": rows, "details": {"runs": runs}})

    def _describe(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return when and with what a run that ends now was measured."""
        device = run["device"]
        return {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            "device": describe_device("cpu") if device == "cpu" else device,
            "versions": describe_versions() | {"torch": run["torch"]},
        }


def _run_of(row: Mapping[str, Any]) -> str:
    return f"{row['comfyui']} on {row['device']}"


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
        option = config.option
        words = ["python", "-m", "pytest", *option.file_or_dir, "--record-host", str(path)]
        for flag, value in (("-m", option.markexpr), ("-k", option.keyword)):
            words += [flag, value] if value else []
        flags = os.environ.get(VARIABLE)
        begin = "" if flags is None else f'{VARIABLE}="{flags}" '
        config.pluginmanager.register(HostRecord(path, begin + shlex.join(words)), "host-record")
