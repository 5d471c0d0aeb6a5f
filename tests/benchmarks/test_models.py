"""Whole models are compared honestly: agreement first, real shapes, one run, nothing zero."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.models.arithmetic import count_flops, find_peak, linear_flops, softmax_flops
from benchmarks.models.random_weights import count_bytes, make_random_wan
from benchmarks.models.runs import list_commands, merge_runs
from benchmarks.models.teachers import HeadlessSubject, Setting
from benchmarks.models.variants import Variant, find_softmax, plan_variants

from benchmarks.kernels.baselines import Contender
from benchmarks.models import agreement, comfyui, measuring, table
from benchmarks.models import cli as benchmark
from benchmarks.models.cli import ScaleConfig
from benchmarks.models.measuring import COMPUTED, SAMPLED, Measured, Patience
from benchmarks.models.sizes import SIZES, spread_layers
from benchmarks.record import write_part
from linvideo_core.models.wan import WanModel
from linvideo_core.run.config import run_command

CPU = Setting(torch.device("cpu"), torch.float32)
SMALL = agreement.shrink(SIZES["tiny"])
ONCE = Patience(runs=1, seconds=0.001, video_seconds=0.0)


def find_default() -> dict[str, Contender]:
    """Return the only softmax backend that every computer has."""
    return find_softmax(["default"], "cpu")[0]


def make_measured(**changes: Any) -> Measured:
    """Return a measurement of an all-softmax model by FlashAttention-2, with changes."""
    usual = {"num_linear": 0, "kept": "fa2", "is_compiled": False, "seconds": 1.0, "peak_gb": 3.0}
    usual |= {"weights_gb": 2.0, "video_seconds": 100.0, "video": COMPUTED}
    return Measured(**{**usual, **changes})


def test_sizes_are_the_published_ones() -> None:
    tokens = {name: SIZES[name].tokens for name in ("1.3b-480p", "14b-480p", "14b-720p")}
    assert tokens == {"1.3b-480p": 32760, "14b-480p": 32760, "14b-720p": 75600}
    assert [len(SIZES[name].layers) for name in tokens] == [16, 22, 22]
    assert 0 not in {layer for size in SIZES.values() for layer in size.layers}
    assert len(set(spread_layers(40, 22))) == 22 and max(spread_layers(40, 22)) < 40
    for name, billions in (("1.3b-480p", 1.42), ("14b-480p", 14.3)):
        with torch.device("meta"):
            model = WanModel(SIZES[name].config)
        assert count_bytes([model]) / 4e9 == pytest.approx(billions, rel=0.01)


def test_every_weight_is_random_and_a_name_decides_which() -> None:
    first, again, other = (
        make_random_wan(SMALL, CPU.device, CPU.dtype, seed) for seed in (0, 0, 1)
    )
    for name, parameter in first.named_parameters():
        assert parameter.count_nonzero() == parameter.numel(), name
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name


def test_operations_are_those_of_the_matrix_products() -> None:
    # Softmax grows with the square of tokens; linear attention, M = D, costs 6 L d D.
    assert softmax_flops(2000, 256) == 4 * softmax_flops(1000, 256)
    assert linear_flops(1000, 256, 128) == 6 * 1000 * 256 * 128
    for name, petaflops in (("1.3b-480p", 0.28), ("14b-720p", 6.6)):
        size = SIZES[name]
        assert count_flops(size, 0) / 1e15 == pytest.approx(petaflops, rel=0.05)
        saved = count_flops(size, 0) - count_flops(size, 16)
        D, L, dim = 128, size.tokens, size.config.dim
        assert saved == 16 * (softmax_flops(L, dim) - linear_flops(L, dim, D))


def test_a_card_that_is_not_known_has_no_share_of_its_peak() -> None:
    assert find_peak("NVIDIA H200") == find_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert find_peak("NVIDIA H100 PCIe") == 756e12
    assert find_peak("NVIDIA L40S") != find_peak("NVIDIA L4")
    assert find_peak("CPU, 2 threads") is None and find_peak("NVIDIA X9000") is None
    rows = table.assemble_rows(SIZES["tiny"], "headless", [make_measured()], "NVIDIA X9000")
    assert rows[0]["mfu"] is None


def test_arranged_models_agree_with_the_plain_one() -> None:
    rows = agreement.check_headless(SIZES["tiny"], find_default(), CPU)
    assert [row["num_linear"] for row in rows] == [0, 1]
    assert rows[0]["error"] == 0
    assert rows[1]["error"] < 1e-5


def test_a_wrong_backend_is_never_timed() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value + query

    wrong = {"default": Contender("sdpa", "softmax", attend)}
    with pytest.raises(RuntimeError, match=r"differs from the plain model by .*; nothing was"):
        agreement.check_headless(SIZES["tiny"], wrong, CPU)
    agreeing, _, left_out = agreement.check_kernels(wrong, CPU)
    assert not agreeing and "sdpa" in left_out[0]


def test_a_subject_is_given_back_as_it_was() -> None:
    teacher = HeadlessSubject(SMALL, find_default(), CPU)
    with torch.inference_mode():
        before = teacher.call_model()
        linear = teacher.with_call(Variant(num_linear=1, kept="default"), lambda call: call())
        assert torch.equal(teacher.call_model(), before)
    assert not torch.allclose(linear, before)


def test_pairs_that_are_compared_are_measured_side_by_side() -> None:
    plan = plan_variants(["fa2", "default"], 16, compiled=True)
    assert [(v.num_linear, v.kept, v.is_compiled) for v in plan] == [
        (0, "fa2", False), (16, "fa2", False), (0, "default", False), (16, "default", False),
        (0, "fa2", True), (16, "fa2", True), (0, "default", True), (16, "default", True),
    ]  # fmt: skip


def test_backends_that_a_computer_lacks_are_named() -> None:
    found, absent = find_softmax(["fa2", "default", "sage"], "cpu")
    assert list(found) == ["default"]
    assert {sentence.split()[0] for sentence in absent} >= {"fa2", "sage"}


def test_ratios_are_to_the_softmax_model_of_the_same_run() -> None:
    measured = [
        make_measured(seconds=8.0),
        make_measured(seconds=5.0, num_linear=22),
        make_measured(seconds=6.0, kept="cudnn"),
        make_measured(seconds=4.0, kept="cudnn", num_linear=22),
        make_measured(seconds=7.5, is_compiled=True),
        make_measured(seconds=3.75, num_linear=22, is_compiled=True),
        make_measured(seconds=3.0, kept="cudnn", num_linear=22, is_compiled=True),
    ]
    rows = table.assemble_rows(SIZES["14b-720p"], "headless", measured, "NVIDIA H200")
    found = {(r["baseline"], r["linear_layers"], r["kept_layers"], r["compiled"]): r for r in rows}
    speedups = {key: row["speedup"] for key, row in found.items()}
    assert speedups == {
        ("fa2", 0, "fa2", False): 1.0,
        ("fa2", 22, "fa2", False): 1.6,
        ("fa2", 22, "cudnn", False): 2.0,
        ("cudnn", 0, "cudnn", False): 1.0,
        ("cudnn", 22, "cudnn", False): 1.5,
        ("fa2", 0, "fa2", True): 1.0,
        ("fa2", 22, "fa2", True): 2.0,
        ("fa2", 22, "cudnn", True): 2.5,
    }
    assert found["fa2", 0, "fa2", False]["mfu"] == pytest.approx(6.6e15 / 8 / 989.4e12, rel=0.05)


def test_a_video_too_long_to_sample_is_computed_and_said_to_be() -> None:
    teacher = HeadlessSubject(dataclasses.replace(SMALL, num_frames=1), find_default(), CPU)
    instruments = ONCE.make_instruments("cpu")
    variant = Variant(num_linear=1, kept="default")
    computed = measuring.measure(teacher, variant, instruments, 0.0)
    assert computed.video == COMPUTED
    assert computed.video_seconds == pytest.approx(100 * computed.seconds)
    sampled = measuring.measure(teacher, variant, instruments, math.inf)
    assert sampled.video == SAMPLED and sampled.video_seconds > 0
    assert sampled.weights_gb > teacher.weight_bytes(Variant(num_linear=0, kept="default")) / 2**30


def test_an_interrupted_run_is_measured_anew_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    teacher = HeadlessSubject(SMALL, find_default(), CPU)
    plan = plan_variants(["default"], 1, compiled=False)

    def stop(stage: str, done: int, total: int, **_: float) -> None:
        if done:
            raise KeyboardInterrupt

    arguments, facts = (teacher, plan, ONCE, CPU.device, path), {"device": "this", "torch": "2"}
    with pytest.raises(KeyboardInterrupt):
        measuring.measure_subject(*arguments, stop, facts)
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 1
    assert measuring.read_measured(path, facts) is None
    measuring.measure_subject(*arguments, lambda *_, **__: None, {**facts, "kept": 1})
    found = measuring.read_measured(path, facts)
    assert len(found["rows"]) == 2 and found["kept"] == 1
    assert measuring.read_measured(path, {**facts, "torch": "3"}) is None


def test_rows_of_another_command_stay_in_a_shared_record(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    usual = {"title": "t", "device": "cpu"}
    write_part(path, "train", command="b", rows=[{"what": "train", "x": 1}], **usual)
    for x in (2, 3):
        write_part(path, "denoise", command="a", rows=[{"what": "denoise", "x": x}], **usual)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [row["x"] for row in record["rows"]] == [1, 3]
    assert record["command"] == "b && a"
    assert set(record["details"]["parts"]) == {"train", "denoise"}
    record["details"]["parts"]["train"]["device"] = "another card"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="measured on another card"):
        write_part(path, "denoise", command="a", rows=[], **usual)


def test_a_size_measured_later_joins_the_table_and_replaces_its_own_rows(tmp_path: Path) -> None:
    def make_run(size: str, where: str, seconds: float, flags: str = "") -> dict[str, Any]:
        facts = {"size": size, "where": where, "device": "card", "versions": {"torch": "2"}}
        return {**facts, "flags": flags, "rows": [vars(make_measured(seconds=seconds))]}

    facts, path = {"device": "card", "versions": {"torch": "2"}}, tmp_path / "scale.json"
    earlier = [make_run("14b-480p", "headless", 3.0), make_run("14b-480p", "ComfyUI 1", 4.0)]
    new = [
        make_run("14b-480p", "headless", 2.0),
        make_run("1.3b-480p", "headless", 1.0, "--runs 9"),
    ]
    runs = merge_runs(earlier, new, facts, path)
    rows = [row for run in runs for row in table.to_rows(run)]
    assert [(row["model"], row["where"], row["seconds"]) for row in rows] == [
        ("Wan 1.3B", "headless", 1.0), ("Wan 14B", "headless", 2.0), ("Wan 14B", "ComfyUI 1", 4.0),
    ]  # fmt: skip
    assert list(list_commands(runs, "measure", "tiny")) == [
        "measure --runs 9 --shapes 1.3b-480p", "measure --shapes 14b-480p --comfyui PATH",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"has 14b-480p measured with device card, and this is X;"):
        merge_runs(earlier, new, {"device": "X"}, path)


def test_bad_input_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--shapes 2b given; names of 1\.3b-480p"):
        ScaleConfig(shapes="2b")
    with pytest.raises(ValueError, match="--softmax fa3 given"):
        ScaleConfig(softmax="fa3")
    nowhere = ScaleConfig(device="cpu", comfyui=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"which holds no comfy/ldm/wan/model\.py"):
        benchmark.run(nowhere)
    assert not (tmp_path / "out").exists()


def test_a_failing_host_says_why_in_a_sentence(tmp_path: Path) -> None:
    job = {"size": "tiny", "device": "cpu"}
    with pytest.raises(ChildProcessError, match=r"ended with status 1; .*No module named 'comfy'"):
        comfyui.measure_in_host(tmp_path, None, job, tmp_path, lambda *_, **__: None)


def test_the_command_runs_on_any_computer_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--runs", "1", "--seconds", "0.001", "--video-seconds", "0.0"]
    command = [*flags, "--most-frames", "2", "--out", str(tmp_path)]
    benchmark.main(command)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "headless_tiny.json", "tokens_tiny_1.json", "tokens_tiny_2.json",
        "scale.json", "scale.png",
    }  # fmt: skip
    record = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert record["command"] == f"python -m benchmarks.models {' '.join(flags)} --most-frames 2"
    assert [(r["linear_layers"], r["baseline"], r["what"]) for r in record["rows"]] == [
        (0, "default", "denoise"), (2, "default", "denoise"),
    ]  # fmt: skip
    assert "tiny Wan" in capsys.readouterr().out
    benchmark.main(command)
    path = tmp_path / "scale.json"
    assert json.loads(path.read_text(encoding="utf-8")) == record
    foreign = {**record["details"]["parts"]["denoise"]["runs"][0], "device": "a card"}
    foreign["size"] = "14b-720p"
    record["details"]["parts"]["denoise"]["runs"] = [foreign]
    path.write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "headless_tiny.json").unlink()
    with pytest.raises(SystemExit):
        run_command(lambda: benchmark.main(command))
    assert "has 14b-720p measured with device a card, and this is" in capsys.readouterr().err
    record["details"]["parts"] = {"train": {"device": "a card"}}
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit):
        run_command(lambda: benchmark.main(command))
    assert "has rows of train measured on a card, and this is" in capsys.readouterr().err
    assert not (tmp_path / "headless_tiny.json").exists()


@pytest.mark.gpu
# Each backend is compiled four times: two show it.
@pytest.mark.parametrize(("softmax", "compiled"), [(None, False), ("fa2,default", True)])
def test_a_quick_run_on_a_gpu_compares_all_backends(
    softmax: str | None, compiled: bool, tmp_path: Path
) -> None:
    quick = {"runs": 1, "seconds": 0.01, "video_seconds": 0.0, "most_frames": 0}
    compared = {"shapes": "tiny", "softmax": softmax, "compiled": compiled}
    record = benchmark.run(ScaleConfig(device="cuda", out=tmp_path, **compared, **quick))
    assert {row["compiled"] for row in record["rows"]} == {False, compiled}
    assert {"fa2", "default"} <= {row["baseline"] for row in record["rows"]}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in record["rows"])


@pytest.mark.gpu
def test_on_a_gpu_compiled_models_agree_whatever_computes_their_softmax() -> None:
    setting = Setting(torch.device("cuda"), torch.bfloat16)
    softmax, _ = find_softmax(["fa2", "default"], "cuda")
    rows = agreement.check_headless(SIZES["tiny"], softmax, setting, compiled=True)
    assert [row["is_compiled"] for row in rows] == 4 * [False] + 4 * [True]
