"""Measuring training steps: what is counted, and what a repeated command leaves."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models.random_models import make_random_teacher
from benchmarks.models.sizes import SIZES, count_flops
from benchmarks.models.training_steps import (
    LOWER_STEPS,
    PHASES,
    StepsConfig,
    capped,
    compare_rows,
    count_step_flops,
    run,
)
from linvideo_core.flow import bind
from linvideo_core.models.config import FrozenConfig
from linvideo_core.run.memory import explained
from linvideo_core.transfer.config import StudentConfig
from linvideo_core.transfer.student import Student

OFFLOADED, FULL = FrozenConfig(offload_blocks=3), StudentConfig(parameters="full")


def make_row(gpus: int, seconds: float, phase: str = "hardened", **more: Any) -> dict[str, Any]:
    return {
        "model": "Wan 1.3B", "resolution": "480p", "gpus": gpus, "phase": phase, "trained": "lora",
        "frozen": "fp32", "offloaded": 0, "recomputed": True, "compiled": False, "batch_per_gpu": 1,
        "cap_gb": None, "seconds": seconds, **more,
    }  # fmt: skip


def configure(out: Path, **changes: Any) -> StepsConfig:
    """Return one untimed and one timed step of the tiny model, with changes."""
    tiny = {"size": "tiny", "device": "cpu", "student": StudentConfig(lora_rank=1)}
    return StepsConfig(untimed_steps=1, timed_steps=1, out=out, **tiny, **changes)


def test_the_speedup_is_in_videos_a_second_over_one_gpu() -> None:
    rows = compare_rows([make_row(1, 2.0), make_row(2, 2.5), make_row(4, 2.5, phase="selecting")])
    assert [row["speedup"] for row in rows] == [1.0, pytest.approx(1.6), None]
    # More videos on each GPU are more work.
    rows = compare_rows([make_row(1, 2.0), make_row(2, 4.0, batch_per_gpu=2)])
    assert rows[1]["speedup"] == pytest.approx(2.0)


def test_the_operations_of_a_call_and_its_way_back_are_those_that_torch_counts() -> None:
    size = dataclasses.replace(SIZES["tiny"], layers=())
    teacher = make_random_teacher(size, "cpu", FrozenConfig())
    student = Student(teacher, StudentConfig(lora_rank=1), seed=0)
    for module in student.mixed.values():
        module.mode = "softmax"
    latents, sigma = torch.randn(1, *size.latent_shape), torch.tensor([0.5])
    forward = count_flops(size, 0)
    backward = count_step_flops(size, phase="hardened", parameters="lora") - 4 * forward
    # The fused softmax of a CPU is work that torch does not count.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = bind(student.model, teacher.prompt_embeds[:1])(latents, sigma)
        assert counter.get_total_flops() == pytest.approx(forward, rel=0.03)
        with FlopCounterMode(display=False) as counter:
            # The first block needs no gradient of what goes into it.
            out.sum().backward()
        assert counter.get_total_flops() == pytest.approx(backward, rel=0.1)


def test_whole_weights_cost_more_on_the_way_back_and_a_choice_more_than_none() -> None:
    size = SIZES["1.3b-480p"]
    counts = {
        (phase, parameters): count_step_flops(size, phase=phase, parameters=parameters)
        for phase in ("selecting", "hardened")
        for parameters in ("lora", "full")
    }
    assert counts["hardened", "full"] > counts["hardened", "lora"]
    assert counts["selecting", "lora"] > counts["hardened", "lora"] > 4 * count_flops(size, 16)


def test_a_repeated_measurement_replaces_its_rows_and_leaves_no_trained_state(
    tmp_path: Path,
) -> None:
    config = configure(tmp_path, phase="hardened")
    for _ in range(2):
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".records", "scale.json"]
    (row,) = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert row["what"] == "train" and row["seconds"] > 0 and row["speedup"] == 1
    assert row["mfu"] is None and row["peak_gb"] is None
    record = json.loads((tmp_path / "scale.json").read_text())
    record["details"]["parts"]["train"]["device"] = "a card"
    (tmp_path / "scale.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rows of train measured on a card, and this is"):
        run(config)
    assert json.loads((tmp_path / "scale.json").read_text()) == record


@pytest.mark.parametrize(
    ("frozen", "num_blocks", "phase"),
    [("fp32", 3, "both"), ("bf16", 0, "hardened"), ("fp8", 3, "hardened")],
)
def test_steps_are_measured_in_every_way_to_hold_frozen_weights(
    frozen: str, num_blocks: int, phase: str, tmp_path: Path
) -> None:
    held = FrozenConfig(frozen=frozen, offload_blocks=num_blocks)
    config = configure(tmp_path, phase=phase, frozen_weights=held)
    found = [(row["frozen"], row["offloaded"], row["phase"]) for row in run(config)["rows"]]
    phases = PHASES if phase == "both" else (phase,)
    assert found == [(frozen, num_blocks, measured) for measured in phases]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen_weights": FrozenConfig(offload_blocks=31)}, "1.3b-480p has 30 blocks"),
        ({"frozen_weights": OFFLOADED, "recomputed": False}, "--recomputed false"),
        ({"frozen_weights": OFFLOADED, "compile": True}, "--compile given"),
        ({"frozen_weights": FrozenConfig(frozen="fp8"), "student": FULL}, "--parameters full"),
        ({"cap_gb": -1.0}, "above 0"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        StepsConfig(**changes)


def test_a_computers_own_memory_cannot_be_capped() -> None:
    with pytest.raises(ValueError, match="a GPU's memory alone"), capped("cpu", 24):
        pass


@pytest.mark.gpu
def test_more_than_the_cap_is_refused_in_one_sentence_and_the_cap_is_lifted() -> None:
    with (
        pytest.raises(ValueError, match=r"memory ran out .* give --frozen fp8"),
        explained(LOWER_STEPS),
        capped("cuda", 0.5),
    ):
        torch.empty(2**30, dtype=torch.uint8, device="cuda")
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
