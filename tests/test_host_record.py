"""`--record-host` writes what ran, and nothing where a host test failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from linvideo_core.records import REPOSITORY, read_record

TESTS = """
import os
import pytest

@pytest.mark.host
def test_a_workflow(record_property):
    for name in ("comfyui", "workflow"):
        record_property(name, os.environ[name])
    record_property("seconds", 1.5)

@pytest.mark.host
@pytest.mark.parametrize("outcome", {outcomes})
def test_another(outcome):
    if outcome == "skip":
        pytest.skip("no reason")
    assert outcome == "pass"

def test_elsewhere():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = host\n")
    return tmp_path


def run(folder: Path, *outcomes: str, comfyui: str = "1.2.3") -> str:
    (folder / "test_made_up.py").write_text(TESTS.format(outcomes=list(outcomes)))
    plugin = ("-p", "tests.host.recording", "--record-host", str(folder / "host.json"))
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, str(folder / "test_made_up.py")],
        cwd=REPOSITORY,
        env={**os.environ, "comfyui": comfyui, "workflow": "demo", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    return finished.stdout


def test_a_row_holds_the_workflow_and_the_counts_of_host_tests_alone(folder: Path) -> None:
    output = run(folder, "pass", "skip", "pass")
    assert "recorded 1 workflows" in output
    record = read_record(folder / "host.json")
    row = {"comfyui": "1.2.3", "workflow": "demo", "seconds": 1.5}
    assert record["rows"] == [row | {"host_tests_passed": 3, "host_tests_skipped": 1}]
    assert record["command"].startswith("python -m pytest")


def test_a_failure_records_nothing_and_leaves_the_record(folder: Path) -> None:
    run(folder, "pass")
    before = (folder / "host.json").read_bytes()
    assert "nothing recorded: 1 host tests failed" in run(folder, "fail", comfyui="2")
    assert (folder / "host.json").read_bytes() == before


def test_rows_of_another_comfyui_stay_and_its_own_are_replaced(folder: Path) -> None:
    for comfyui, outcomes in (("1", ["pass"]), ("2", ["pass"]), ("1", ["pass", "skip"])):
        run(folder, *outcomes, comfyui=comfyui)
    rows = read_record(folder / "host.json")["rows"]
    found = {row["comfyui"]: row["host_tests_skipped"] for row in rows}
    assert found == {"1": 1, "2": 0} and len(rows) == 2
