"""Kernels are compared honestly: agreement first, then floors and ratios of what was measured."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import agreement, contenders, speed
from benchmarks.kernels import cli as benchmark
from benchmarks.kernels.cli import BenchmarkConfig
from benchmarks.kernels.contenders import (
    KITCHEN,
    MODULES,
    Contender,
    Setting,
    Shape,
    find_public,
    make_contenders,
    make_inputs,
)
from benchmarks.kernels.speed import BACKWARD, FORWARD, FROZEN, Measured, Task
from benchmarks.kernels.timing import extra_mb, milliseconds

MODULE = next(iter(MODULES))
SHAPE = Shape(33, 2)
CPU = Setting(torch.device("cpu"), torch.float32, seconds=0.0)


def contenders_of(*names: str) -> list[Contender]:
    """Return contenders that run on a CPU, the fused kernels as the reference."""
    return [c for c in make_contenders(backend="reference") if c.name in names]


def test_rows_hold_each_fused_step_and_the_others_over_it() -> None:
    times = {
        ("fused", FORWARD, 1): 2.0, ("fused", BACKWARD, 1): 4.0, ("fused", FROZEN, 1): 3.0,
        ("fused", "module", 1): 2.5, ("fused", MODULE, 1): 5.0,
        ("eager", FORWARD, 1): 10.0, ("eager", FROZEN, 1): 9.0, ("eager", MODULE, 1): 15.0,
        ("sdpa", FORWARD, 0): 100.0, ("sdpa", BACKWARD, 0): 300.0, ("sdpa", MODULE, 0): 110.0,
        ("sdpa", KITCHEN, 0): 105.0,
    }  # fmt: skip
    measured = [
        Measured(SHAPE, step, ratio, name, milliseconds, 1.5)
        for (name, step, ratio), milliseconds in times.items()
    ]
    errors = [
        {"contender": "fused", "ratio": 1, "tokens": 5, "forward": 1e-3, "key": 2e-3},
        {"contender": "fused", "ratio": 1, "tokens": 6, "forward": 3e-3, "key_map": 4e-3},
        {"contender": "fused", "ratio": 2, "tokens": 5, "forward": 9e-3},
        {"contender": "eager", "ratio": 1, "tokens": 5, "forward": 5e-3},
    ]
    bandwidth = 4 * 33 * 2 * 128 * 2 * 1000  # the floor of forward is 1 ms
    rows = speed.assemble_rows(measured, errors, bandwidth, 2)
    assert [row["pass"] for row in rows] == [FORWARD, BACKWARD, FROZEN, "module", MODULE]
    assert list(rows[0]) == [
        "shape", "pass", "features", "milliseconds", "floor_ratio", "vs_compile",
        "vs_compile_half", "vs_eager", "vs_fla", "vs_sdpa", "vs_fa2", "vs_cudnn", "vs_sage",
        "vs_kitchen", "extra_mb", "relative_error", "eager_error",
    ]  # fmt: skip
    forward, backward, frozen, module, eager_module = rows
    assert (forward["shape"], forward["features"], forward["extra_mb"]) == ("33 x 2", "D", 1.5)
    assert forward["floor_ratio"] == pytest.approx(2.0)
    assert backward["floor_ratio"] == pytest.approx(4 / 1.75)
    assert (forward["vs_eager"], forward["vs_sdpa"], forward["vs_compile"]) == (5.0, 50.0, None)
    assert (backward["vs_eager"], backward["vs_sdpa"]) == (None, 75.0)
    assert (frozen["vs_eager"], frozen["vs_sdpa"]) == (3.0, 100.0)
    assert (module["vs_eager"], module["vs_sdpa"]) == (6.0, 44.0)
    assert (eager_module["vs_eager"], eager_module["vs_sdpa"]) == (3.0, 22.0)
    assert (module["vs_kitchen"], forward["vs_kitchen"]) == (42.0, None)
    assert (forward["relative_error"], forward["eager_error"]) == (3e-3, 5e-3)
    assert (backward["relative_error"], frozen["relative_error"]) == (4e-3, 2e-3)


def test_causal_attention_sees_no_later_token() -> None:
    inputs = make_inputs(SHAPE, 1, CPU)
    exact = agreement.define_causal(*inputs)
    changed = [inputs[0], *(x.clone() for x in inputs[1:3]), *inputs[3:]]
    for x in changed[1:3]:
        x[:, 20:] = 1.0
    found = agreement.define_causal(*changed)
    assert torch.equal(found[:, :20], exact[:, :20])
    assert not torch.allclose(found[:, 20:], exact[:, 20:])


def test_every_contender_agrees_in_value_and_gradients() -> None:
    wanted = contenders_of("fused", "eager", "sdpa", "compile_half")
    agreeing, rows, left_out = agreement.check_contenders(wanted, CPU, (33,), 2)
    assert agreeing == wanted and not left_out
    cells = {(row["contender"], row["ratio"], row["tokens"]) for row in rows}
    assert len(rows) == len(cells) == 3 * 2 + 1
    for row in rows:
        gradients = agreement.INPUTS[: 5 if row["ratio"] else 3]
        names = {"forward", *(gradients if row["contender"] != "compile_half" else ())}
        assert row.keys() == {"contender", "ratio", "tokens", *names}
        assert max(row[name] for name in names) < 1e-4


def wrong(contender: Contender) -> Contender:
    """Return a contender that is 2 percent off."""
    return dataclasses.replace(contender, attend=lambda *x: 1.02 * contender.attend(*x))


def test_every_module_agrees_with_eager_norm_and_rotation() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the benchmark itself checks the compiled kernels")
    [own] = contenders_of("fused")
    rows = agreement.check_modules(own, list(MODULES), CPU, 5, 2)
    assert [row["ratio"] for row in rows] == [1, 1, 2, 2]
    for row, step in zip(rows, [*MODULES, *MODULES], strict=True):
        assert row[step] < 1e-4


def test_nothing_is_timed_where_our_own_kernels_are_wrong() -> None:
    own, eager = contenders_of("fused", "eager")
    with pytest.raises(RuntimeError, match=f"{MODULE} differs from its definition"):
        agreement.check_modules(wrong(own), [MODULE], CPU, 5, 2)
    with pytest.raises(RuntimeError, match="fused cannot be timed: it differs from its definition"):
        speed.measure_speed([SHAPE], [32], [wrong(own), eager], [MODULE], CPU, lengths=(32, 33))


def test_a_rival_that_is_wrong_or_cannot_run_is_left_out_and_named() -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this card")

    own, eager, sdpa = contenders_of("fused", "eager", "sdpa")
    broken = dataclasses.replace(sdpa, attend=fail)
    agreeing, _, left_out = agreement.check_contenders([own, wrong(eager), broken], CPU, (32,), 2)
    assert agreeing == [own]
    assert left_out[0].startswith(
        "eager cannot be timed: it differs from its definition in fp64 by 2.0e-02 ("
    )
    assert left_out[1] == "sdpa cannot be timed: no kernel"
    nan = dataclasses.replace(eager, attend=lambda *x: math.nan * eager.attend(*x))
    agreeing, *_ = agreement.check_contenders([own, nan], CPU, (32,), 2)
    assert agreeing == [own]


def test_a_rival_that_fails_at_a_size_costs_only_its_own_figure() -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    own, eager = contenders_of("fused", "eager")
    broken = dataclasses.replace(eager, attend=fail)
    tasks = [Task(SHAPE, FORWARD, 1, contender) for contender in (own, broken)]
    measured, failed = speed.measure_all(tasks, CPU)
    assert [item.contender for item in measured] == ["fused"]
    assert failed == ["eager, forward at 33 x 2: out of memory"]


def test_a_public_package_is_compared_or_named() -> None:
    found, absent = find_public()
    assert len(found) + len(absent) == 2
    for sentence in absent:
        assert " is not compared: " in sentence


def test_backward_is_timed_alone_with_and_without_the_maps() -> None:
    [own] = contenders_of("fused")
    for step, count in ((BACKWARD, 5), (FROZEN, 3)):
        call = speed.make_call(Task(SHAPE, step, 2, own), CPU)
        first, again = call(), call()
        assert len(first) == count
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.slow
def test_the_compiled_definition_is_differentiated_again_and_again() -> None:
    [compiled] = contenders_of("compile")
    call = speed.make_call(Task(SHAPE, BACKWARD, 1, compiled), CPU)
    assert all(torch.equal(x, y) for x, y in zip(call(), call(), strict=True))


def test_the_whole_measurement_runs_and_is_a_record(tmp_path: Path) -> None:
    wanted = contenders_of("fused", "eager", "sdpa")
    rows, details = speed.measure_speed(
        [SHAPE], [16, 32], wanted, [MODULE], CPU, lengths=(32, 33), num_copied=2**10
    )
    steps = [FORWARD, BACKWARD, FROZEN, MODULE]
    cells = [(row["pass"], row["features"]) for row in rows]
    assert cells == [(step, features) for step in steps for features in ("D", "2D")]
    for row in rows:
        assert row["milliseconds"] > 0 and row["floor_ratio"] > 0
        assert row["vs_eager"] > 0 and row["vs_sdpa"] > 0
        assert row["vs_compile"] is None
        assert 0 < row["relative_error"] < 1e-4
    layers = [(row["tokens"], row["layer"]) for row in details["over_tokens"]]
    assert layers == [(n, layer) for n in (16, 32) for layer in ("linear", "softmax")]
    json.dumps(details)


@pytest.mark.gpu
def test_extra_memory_is_what_a_call_takes_beyond_what_it_returns() -> None:
    device = torch.device("cuda")
    x = torch.randn(2**20, device=device)
    assert extra_mb(lambda: x + 1, device) == 0
    assert extra_mb(lambda: (x + 1).sum(0, keepdim=True), device) == pytest.approx(4, rel=0.1)
    assert 0 < milliseconds(lambda: x + 1, device, 0.01) < 1


@pytest.mark.gpu
def test_a_run_on_a_gpu_writes_the_record_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "SHAPES", (Shape(4680, 12),))
    quick = {"most_tokens": 4096, "seconds": 0.1}
    record = benchmark.run(BenchmarkConfig(device="cuda", out=tmp_path, **quick))
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.png"}
    assert record["command"].endswith("kernels --device cuda --most-tokens 4096 --seconds 0.1")
    assert {row["features"] for row in record["rows"]} == {"D", "2D"}
    for row in record["rows"]:
        assert row["milliseconds"] > 0 and row["floor_ratio"] > 0
        assert row["relative_error"] < 1e-2
        assert row["vs_sdpa"] > 0 and row["vs_eager"] > 0


def test_a_wrong_layer_is_not_timed_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def attend_wrongly(
        kernel: str, query: Tensor, key: Tensor, value: Tensor, *_: Tensor
    ) -> Tensor:
        return value + 0.0 * (query + key)

    monkeypatch.setattr(contenders, "_attend_softmax", attend_wrongly)
    with pytest.raises(RuntimeError, match="sdpa cannot be timed: it differs from its definition"):
        benchmark.run(BenchmarkConfig(device="cpu", most_tokens=2048, out=tmp_path))


def test_the_slope_of_a_power_law_is_its_exponent_whatever_small_sizes_cost() -> None:
    sizes = [2**i for i in range(10, 17)]
    rows = [{"tokens": n, "layer": "x", "ms": max(n**1.5, 2.0**18)} for n in reversed(sizes)]
    assert speed.fit_slope(rows, "x", "ms") == pytest.approx(1.5)
    assert math.isnan(
        speed.fit_slope([{"tokens": n, "layer": "x", "mb": 0} for n in sizes], "x", "mb")
    )


def test_the_command_writes_a_record_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--device cpu --most-tokens 4096 --seconds 0.01"
    benchmark.main([*flags.split(), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"cost_cpu.json", "cost_cpu.png"}
    record = json.loads((tmp_path / "cost_cpu.json").read_text(encoding="utf-8"))
    assert record["command"] == f"python -m benchmarks.kernels {flags}"
    cells = [(row["tokens"], row["layer"]) for row in record["rows"]]
    assert cells == [(n, layer) for n in (1024, 2048, 4096) for layer in ("linear", "softmax")]
    for row in record["rows"]:
        assert tuple(row) == ("tokens", "layer", "milliseconds", "extra_mb")
        assert row["milliseconds"] > 0
    # The output alone is 2 MB. Linux counts pages in lots, and may lack some of each core's.
    assert all(row["extra_mb"] > 1 for row in record["rows"][-2:])
    assert "time grows as linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"most_tokens": 100}, "--most-tokens 100 given; at least 2048 is needed"),
        ({"seconds": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BenchmarkConfig(**changes)
