"""The cost of a layer is measured honestly: right first, then time and memory by size."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import cli as benchmark
from benchmarks.kernels import cost
from benchmarks.kernels.cli import BenchmarkConfig
from benchmarks.kernels.cost import check_agreement, fit_slope


def test_both_layers_compute_their_definition() -> None:
    errors = check_agreement()
    assert errors.keys() == {"linear", "softmax"}
    assert max(errors.values()) < 1e-5


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "HEAD_DIM", 64)
    monkeypatch.setattr(cost, "softmax_attention", lambda query, key, value: 2 * value)
    with pytest.raises(RuntimeError, match="softmax layer differs from its definition"):
        check_agreement()


def test_the_slope_of_a_power_law_is_its_exponent_whatever_small_sizes_cost() -> None:
    sizes = [2**i for i in range(10, 17)]
    rows = [{"tokens": n, "layer": "x", "ms": max(n**1.5, 2.0**18)} for n in reversed(sizes)]
    assert fit_slope(rows, "x", "ms") == pytest.approx(1.5)
    assert math.isnan(fit_slope([{"tokens": n, "layer": "x", "mb": 0} for n in sizes], "x", "mb"))


def test_every_number_of_tokens_is_twice_the_one_before() -> None:
    usual = BenchmarkConfig(device="cpu").settle()
    assert usual.sizes == [1024 * 2**i for i in range(7)]
    assert BenchmarkConfig(fewest_tokens=100, most_tokens=500).sizes == [100, 200, 400]
    with pytest.raises(ValueError, match="--most-tokens 100 given"):
        BenchmarkConfig(fewest_tokens=100, most_tokens=100)


def test_the_command_writes_a_record_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--fewest-tokens", "2048", "--most-tokens", "4096", "--runs", "2"]
    benchmark.main(["--device", "cpu", *sizes, "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"cost_cpu.json", "cost_cpu.png"}
    record = json.loads((tmp_path / "cost_cpu.json").read_text(encoding="utf-8"))
    assert record["command"].endswith(
        "--device cpu --fewest-tokens 2048 --most-tokens 4096 --runs 2"
    )
    cells = [(row["tokens"], row["layer"]) for row in record["rows"]]
    assert cells == [(n, layer) for n in (2048, 4096) for layer in ("linear", "softmax")]
    for row in record["rows"]:
        assert tuple(row) == ("tokens", "layer", "milliseconds", "extra_mb")
        assert row["milliseconds"] > 0
        # The output alone is as large as this.
        assert row["extra_mb"] >= 0.9 * row["tokens"] * 128 * 4 / 2**20
    assert "log-log slope" in capsys.readouterr().out


def test_what_is_not_given_is_usual_for_the_device() -> None:
    usual = BenchmarkConfig(device="cpu", runs=2).settle()
    assert (usual.most_tokens, usual.runs, usual.seconds) == (65536, 2, 25.0)
    quick = BenchmarkConfig(device="cpu", quick=True, out=Path("runs")).settle()
    assert (quick.most_tokens, quick.runs) == (4096, 3)


def test_a_quick_run_never_replaces_the_measured_record() -> None:
    with pytest.raises(ValueError, match="--quick given without --out"):
        BenchmarkConfig(quick=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--device cuda given, which this machine lacks"):
        benchmark.run(BenchmarkConfig(device="cuda"))


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu_writes_the_record_of_the_kernels(tmp_path: Path) -> None:
    record = benchmark.run(BenchmarkConfig(device="cuda", quick=True, out=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.png"}
    assert record["command"].endswith("benchmark --device cuda --quick")
    assert {row["features"] for row in record["rows"]} == {"D", "2D"}
    for row in record["rows"]:
        assert row["milliseconds"] > 0 and row["floor_ratio"] > 0
        assert row["relative_error"] < 1e-2
        assert row["vs_sdpa"] > 0 and row["vs_eager"] > 0
    assert record["details"]["copy_terabytes_per_second"] > 0
