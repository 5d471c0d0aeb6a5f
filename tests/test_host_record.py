"""`--record-host` writes what ran, and nothing where a host test failed."""

import json
from collections.abc import Callable

import pytest

from benchmarks.record import describe_device, read_record

pytest_plugins = ["pytester"]

TESTS = """
import os
import pytest

@pytest.mark.host
def test_a_workflow(record_property):
    for name in ("comfyui", "device", "workflow"):
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
    # Each run would import the plugins of this installation again.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*outcomes: str, comfyui: str = "1.2.3", device: str = "cpu") -> str:
        monkeypatch.setenv("comfyui", comfyui)
        monkeypatch.setenv("device", device)
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
    row = {"comfyui": "1.2.3", "device": "cpu", "workflow": "demo", "seconds": 1.5}
    assert record["rows"] == [row | {"host_tests_passed": 3, "host_tests_skipped": 1}]
    assert record["command"].startswith("python -m pytest")


def test_a_failure_records_nothing_and_leaves_the_record(
    run: Run, pytester: pytest.Pytester
) -> None:
    run("pass")
    before = (pytester.path / "host.json").read_bytes()
    assert "nothing recorded: 1 host tests failed" in run("fail", comfyui="2")
    assert (pytester.path / "host.json").read_bytes() == before


def test_rows_of_another_comfyui_or_device_stay_and_its_own_are_replaced(
    run: Run, pytester: pytest.Pytester
) -> None:
    for comfyui, device, outcomes in (
        ("1", "cpu", ["pass"]),
        ("2", "cpu", ["pass"]),
        ("1", "a card", ["skip", "skip"]),
        ("1", "cpu", ["pass", "skip"]),
    ):
        run(*outcomes, comfyui=comfyui, device=device)
    record = read_record(pytester.path / "host.json")
    found = {(x["comfyui"], x["device"]): x["host_tests_skipped"] for x in record["rows"]}
    assert found == {("1", "cpu"): 1, ("2", "cpu"): 0, ("1", "a card"): 2}
    assert len(record["rows"]) == 3
    assert record["device"] == f"{describe_device('cpu')} / a card"
    runs = record["details"]["runs"]
    assert {name: told["device"] for name, told in runs.items()} == {
        "1 on cpu": describe_device("cpu"),
        "2 on cpu": describe_device("cpu"),
        "1 on a card": "a card",
    }


def test_rows_of_another_version_of_linvideo_go(run: Run, pytester: pytest.Pytester) -> None:
    path = pytester.path / "host.json"
    run("pass", comfyui="1")
    record = read_record(path)
    record["details"]["runs"]["1 on cpu"]["versions"]["linvideo"] = "0.0.1"
    path.write_text(json.dumps(record))
    run("pass", comfyui="2")
    assert [row["comfyui"] for row in read_record(path)["rows"]] == ["2"]
