"""Models are measured inside a real ComfyUI, by its own sampling, with the pack applied."""

import json
from pathlib import Path

import pytest

from benchmarks.models import cli as benchmark
from benchmarks.models.cli import ScaleConfig
from tests.host.conftest import Host

pytestmark = pytest.mark.host


def test_the_benchmark_measures_comfyui_beside_the_core(host: Host, tmp_path: Path) -> None:
    quick = {"runs": 1, "seconds": 0.001, "video_seconds": 0.0, "most_frames": 0}
    where = {"comfyui": host.root, "comfyui_python": host.python}
    record = benchmark.run(ScaleConfig(device="cpu", out=tmp_path, **quick, **where))
    version = record["rows"][-1]["where"].removeprefix("ComfyUI ")
    assert [(row["where"], row["linear_layers"]) for row in record["rows"]] == [
        ("headless", 0), ("headless", 2), (f"ComfyUI {version}", 0), (f"ComfyUI {version}", 2),
    ]  # fmt: skip
    assert "--comfyui PATH" in record["command"] and str(host.root) not in record["command"]
    path = tmp_path / f"comfyui-{version}_tiny.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    models = [row for row in found["agreement"] if "where" in row]
    assert [row["num_linear"] for row in models] == [0, 1]
    assert all(row["error"] < 1e-4 for row in models)
    assert found["host_attention"] == "attention_pytorch"
