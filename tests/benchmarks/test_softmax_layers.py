"""Softmax layers and what may stand there are compared in one run, and rows say what they are."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import softmax_layers
from benchmarks.models.sizes import SIZES
from benchmarks.models.softmax_layers import SoftmaxConfig
from benchmarks.record import read_record


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_run_compares_softmax_linear_and_hybrid_layers(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("comfy_kitchen")
    flags = ["--shapes", "tiny", "--backends", "default", "--density", "0.2,1"]
    softmax_layers.main([*flags, "--device", device, "--out", str(tmp_path)])
    record = read_record(tmp_path / "softmax_layers.json")
    names = ("softmax_backend", "density", "linear_layers", "hybrid_layers", "tile")
    found = [tuple(row[name] for name in names) for row in record["rows"]]
    assert found == 2 * [
        ("default", 1, 0, 0, None), ("default", 1, 2, 0, None),
        (None, None, 4, 0, None), (None, None, 0, 4, "1x3x4"), (None, None, 0, 4, "2x4x5"),
        ("sparse", 0.2, 0, 0, None), ("sparse", 0.2, 2, 0, None),
        ("sparse", 1, 0, 0, None), ("sparse", 1, 2, 0, None),
    ]  # fmt: skip
    baseline = record["rows"][0]
    assert baseline["speedup"] == 1 and baseline["baseline"] == "default, 50 steps"
    for whole, few in zip(record["rows"][:9], record["rows"][9:], strict=True):
        assert (whole["steps"], few["steps"], whole["layers"]) == (50, 4, 4)
        assert whole["speedup"] == pytest.approx(baseline["seconds"] / whole["seconds"])
        assert few["speedup"] == pytest.approx(25 * whole["speedup"])
    agreed = record["details"]["parts"]["speed"]["runs"][0]["agreement"]
    assert {"hybrid", "fused"} <= {row.get("contender") for row in agreed}
    assert "2x4x5" in capsys.readouterr().out


def test_rows_of_a_size_replace_its_own_alone(tmp_path: Path) -> None:
    def write(name: str) -> dict[str, Any]:
        config = SoftmaxConfig(shapes=name, density="0.3", out=tmp_path)
        row = {"num_linear": 0, "kept": "default", "tile": None, "seconds": 1.0, "peak_gb": 1.0}
        found = {"size": name, "rows": [row]}
        return softmax_layers._write(config, SIZES[name], found, {}, "cpu")

    for name in ("1.3b-480p", "tiny", "1.3b-480p"):
        record = write(name)
    assert [row["model"] for row in record["rows"]] == 2 * ["tiny Wan"] + 2 * ["Wan 1.3B"]
    command = "python -m benchmarks.models.softmax_layers --shapes"
    given = [f"{command} {name} --density 0.3" for name in ("tiny", "1.3b-480p")]
    assert record["command"] == " && ".join(given)


def test_tiles_and_kernels_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    assert [size.tiles for size in SoftmaxConfig(tile="1x2x3").list_sizes()] == 2 * [("1x2x3",)]
    with pytest.raises(ValueError, match="--tile 1x2 given; frames x height x width"):
        SoftmaxConfig(tile="1x2")
    with pytest.raises(ValueError, match="--tile 0x6x8 given, and a video is 5 x 6 x 8 tokens"):
        SoftmaxConfig(shapes="tiny", tile="1x2x3,0x6x8")
    for density in ("", "0.1,nan", "0", "1.5", "much"):
        with pytest.raises(ValueError, match=f"--density {density or repr('')} given; each"):
            SoftmaxConfig(density=density)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file and a folder is needed"):
        softmax_layers.run(SoftmaxConfig(shapes="tiny", device="cpu", out=tmp_path / "file"))
    pytest.importorskip("comfy_kitchen")
    with pytest.raises(ValueError, match="--backends default,fa2 given, and fa2 cannot be had"):
        softmax_layers.run(
            SoftmaxConfig(shapes="tiny", device="cpu", backends="default,fa2", out=tmp_path)
        )
