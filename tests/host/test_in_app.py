"""Transfers are measured in a real server, beside the headless core."""

from pathlib import Path

import pytest

from benchmarks.in_app import cli as in_app
from benchmarks.in_app.cli import InAppConfig
from tests.host.conftest import Host

pytestmark = pytest.mark.host


def test_the_benchmark_makes_a_file_in_the_app_and_headless(host: Host, tmp_path: Path) -> None:
    where = {"comfyui": host.root, "python": host.python, "out": tmp_path, "cpu": True}
    record = in_app.run(InAppConfig(rows="1.3b-bf16,1.3b-headless", steps=2, frames=5, **where))
    in_the_app, headless = record["rows"]
    assert in_the_app["ok"] and headless["ok"], record["rows"]
    assert in_the_app["base_restored"] and in_the_app["change"] > 0
    assert in_the_app["steps"] == headless["steps"] == 2
    ratio = in_the_app["seconds_per_step"] / headless["seconds_per_step"]
    assert headless["app_over_headless"] == pytest.approx(ratio)
    assert in_the_app["peak_gb"] > 0.1 and headless["peak_gb"] > 0.1
    stages = record["details"]["parts"]["1.3b-bf16"]["stages"]
    assert [stage["name"] for stage in stages][-1] == "training"
    assert not (tmp_path / "comfyui").exists()
