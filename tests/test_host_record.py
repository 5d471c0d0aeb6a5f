"""`--record-host` writes what ran, and nothing where a host test failed."""

from collections.abc import Callable

import pytest

from linvideo_core.records import read_record

pytest_plugins = ["pytester"]

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


Run = Callable[..., str]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs pytest in its folder on tests of some outcomes and returns what it said."""
    pytester.makeini("[pytest]\nmarkers = host\n")
    monkeypatch.setenv("workflow", "demo")

    def run(*outcomes: str, comfyui: str = "1.2.3") -> str:
        monkeypatch.setenv("comfyui", comfyui)
        pytester.makepyfile(TESTS.format(outcomes=list(outcomes)))
        plugin = ("-p", "tests.host.recording", "--record-host", "host.json")
        return pytester.runpytest_inprocess(*plugin).stdout.str()

    return run


def test_a_row_holds_the_workflow_and_the_counts_of_host_tests_alone(
    run: Run, pytester: pytest.Pytester
) -> None:
    output = run("pass", "skip", "pass")
    assert "recorded 1 workflows" in output
    record = read_record(pytester.path / "host.json")
    row = {"comfyui": "1.2.3", "workflow": "demo", "seconds": 1.5}
    assert record["rows"] == [row | {"host_tests_passed": 3, "host_tests_skipped": 1}]
    assert record["command"].startswith("python -m pytest")


def test_a_failure_records_nothing_and_leaves_the_record(
    run: Run, pytester: pytest.Pytester
) -> None:
    run("pass")
    before = (pytester.path / "host.json").read_bytes()
    assert "nothing recorded: 1 host tests failed" in run("fail", comfyui="2")
    assert (pytester.path / "host.json").read_bytes() == before


def test_rows_of_another_comfyui_stay_and_its_own_are_replaced(
    run: Run, pytester: pytest.Pytester
) -> None:
    for comfyui, outcomes in (("1", ["pass"]), ("2", ["pass"]), ("1", ["pass", "skip"])):
        run(*outcomes, comfyui=comfyui)
    rows = read_record(pytester.path / "host.json")["rows"]
    found = {row["comfyui"]: row["host_tests_skipped"] for row in rows}
    assert found == {"1": 1, "2": 0} and len(rows) == 2
