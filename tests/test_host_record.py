"""`--record-host` writes what ran, and nothing where a host test failed."""

import json
from collections.abc import Callable

import pytest

from benchmarks.record import describe_device, read_record

pytest_plugins = ["pytester"]

TESTS = """
import json
import os
import pytest

@pytest.mark.host
def test_a_workflow(record_property):
    for name, value in json.loads(os.environ["TOLD"]).items():
        record_property(name, value)

@pytest.mark.host
@pytest.mark.parametrize("outcome", {outcomes})
def test_another(outcome):
    if outcome == "skip":
        pytest.skip("no reason")
    assert outcome == "pass"

def test_elsewhere():
    pass
"""


RAN_WITH = {"torch": "2.13.0", "triton": None, "linear_layers": "plain"}
WORKFLOW = {"workflow": "demo", "seconds": 1.5}

Run = Callable[..., str]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs pytest in its folder on tests of some outcomes and returns what it said."""
    pytester.makeini("[pytest]\nmarkers = host\n")
    # Each run would import the plugins of this installation again.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*outcomes: str, comfyui: str = "1.2.3", device: str = "cpu") -> str:
        told = {"comfyui": comfyui, "device": device, **RAN_WITH, **WORKFLOW}
        monkeypatch.setenv("TOLD", json.dumps(told))
        pytester.makepyfile(test_file=TESTS.format(outcomes=list(outcomes)))
        plugin = ("-p", "tests.host.recording", "--record-host", "host.json")
        ran = pytester.runpytest_inprocess("test_file.py", *plugin, "-v", "-m", "host")
        return ran.stdout.str()

    return run


def test_a_run_has_a_row_of_host_tests_and_one_for_each_workflow(
    run: Run, pytester: pytest.Pytester
) -> None:
    output = run("pass", "skip", "pass")
    assert "recorded 1 workflows" in output
    record = read_record(pytester.path / "host.json")
    place = {"comfyui": "1.2.3", "device": "cpu"}
    counts = {"passed": 3, "failed": 0, "skipped": 1}
    assert record["rows"] == [place | RAN_WITH | counts, place | WORKFLOW]
    assert record["command"] == "python -m pytest test_file.py --record-host host.json -m host"
    assert record["versions"]["torch"] == RAN_WITH["torch"]


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
    tests = [row for row in record["rows"] if "passed" in row]
    found = {(row["comfyui"], row["device"]): row["skipped"] for row in tests}
    assert found == {("1", "cpu"): 1, ("2", "cpu"): 0, ("1", "a card"): 2}
    assert (len(tests), len(record["rows"])) == (3, 6)
    assert record["device"] == f"{describe_device('cpu')} / a card"
    runs = record["details"]["runs"]
    assert {name: told["device"] for name, told in runs.items()} == {
        "1 on cpu": describe_device("cpu"),
        "2 on cpu": describe_device("cpu"),
        "1 on a card": "a card",
    }
