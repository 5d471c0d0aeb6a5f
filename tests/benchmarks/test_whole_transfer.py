"""A whole transfer of a random model, a row a stage."""

import json
from pathlib import Path

import pytest

from benchmarks.models import whole_transfer
from linvideo_core.run.errors import SettingError


@pytest.mark.slow
def test_a_whole_transfer_is_run_and_each_of_its_stages_is_a_row(
    tmp_path: Path, one_thread: None
) -> None:
    whole_transfer.main(["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "recipe.json").read_text())
    *rows, estimate = record["rows"]
    stages = [row["stage"] for row in rows]
    assert stages[:4] == ["reading and estimating", "filling_pool", "warm_start", "training"]
    assert stages[4:] == 3 * ["evaluation"]
    assert estimate["what"] == "estimate"
    assert estimate["estimated_seconds"] > 0
    assert estimate["seconds"] > sum(row["seconds"] for row in rows[2:])
    # The tile that a transfer finds by itself.
    assert {(row["model"], row["tile"]) for row in record["rows"]} == {("tiny Wan", "2x2x2")}
    assert (tmp_path / "run" / "linearized.safetensors").exists()
    with pytest.raises(SettingError, match="a GPU's memory alone can be capped"):
        whole_transfer.main(["--size", "tiny", "--device", "cpu", "--cap-gb", "1"])
