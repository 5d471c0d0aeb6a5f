"""Transfers are measured in a real server, beside the headless core."""

from pathlib import Path

import pytest

from benchmarks.in_app import cli as in_app
from benchmarks.in_app import sampling
from benchmarks.in_app.cli import InAppConfig
from benchmarks.record import read_record
from tests.host.conftest import Host

pytestmark = pytest.mark.host


def test_the_benchmark_makes_a_file_in_the_app_and_headless(host: Host, tmp_path: Path) -> None:
    where = {"comfyui": host.root, "python": host.python, "out": tmp_path, "cpu": True}
    names = "1.3b-bf16,1.3b-linear,1.3b-hybrid,1.3b-headless"
    record = in_app.run(InAppConfig(rows=names, steps=2, frames=5, **where))
    in_the_app, linear, given, headless = record["rows"]
    assert all(row["ok"] for row in record["rows"]), record["rows"]
    for row in (in_the_app, linear, given):
        assert row["base_restored"] and row["change"] > row["applied_error"] == 0
    assert (in_the_app["tile"], headless["tile"]) == ("1x2x2", "1x2x2")
    assert (linear["tile"], given["tile"]) == (None, "2x4x5")
    assert in_the_app["steps"] == headless["steps"] == 2
    ratio = in_the_app["seconds_per_step"] / headless["seconds_per_step"]
    assert headless["app_over_headless"] == pytest.approx(ratio)
    assert in_the_app["peak_gb"] > 0.1 and headless["peak_gb"] > 0.1
    stages = record["details"]["parts"]["1.3b-bf16"]["stages"]
    assert [stage["name"] for stage in stages][-1] == "training"
    assert not (tmp_path / "linvideo-benchmark-server").exists()


def test_samplings_of_all_steps_and_of_four_are_rows_of_one_record(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--comfyui", host.root, "--python", host.python, "--out", tmp_path]
    sampling.main([*map(str, where), "--cpu", "--steps", "2"])
    rows = read_record(tmp_path / "softmax_layers.json")["rows"]
    names = ("what", "linear_layers", "hybrid_layers", "tile", "steps", "cfg")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("sampling", 0, 0, None, 2, 5.0),
        ("sampling", 2, 0, None, 2, 5.0),
        ("sampling", 0, 4, "2x4x5", 2, 5.0),
        ("few_steps", 2, 0, None, 4, 1.0),
        ("few_steps", 0, 4, "2x4x5", 4, 1.0),
    ]
    default, _, _, few, hybrid = rows
    assert few["baseline"] == "default, 50 guided steps by 2 measured"
    assert few["speedup"] == pytest.approx(25 * default["seconds"] / few["seconds"])
    assert "2 of 4 layers are linear" in few["said"]
    assert "4 of 4 layers are hybrid" in hybrid["said"]
    assert few["baseline"] in capsys.readouterr().out
