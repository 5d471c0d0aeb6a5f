"""Too little memory is said before anything long begins, and what fits is not refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models.sizes import SIZES
from linvideo_core.artifact import Artifact, save
from linvideo_core.distill import command as distill
from linvideo_core.flow import bind
from linvideo_core.models.attention_sites import checkpoint_activations, shapes_of
from linvideo_core.models.config import FROZEN, FrozenConfig
from linvideo_core.models.quantized import count_frozen_bytes, place
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run import memory
from linvideo_core.run.config import override
from linvideo_core.run.memory import (
    Need,
    Transformer,
    check_memory,
    count,
    count_low_rank,
    explained,
    free_bytes,
    training_needs,
)
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import StudentConfig, TransferConfig
from linvideo_core.transfer.preflight import Plan, check_transfer
from linvideo_core.transfer.student import Student
from tests.conftest import TEXT_DIM, save_inputs

HUGE = 10**18


tells_free_memory = pytest.mark.skipif(
    free_bytes("cpu") is None, reason="this system does not tell its free memory"
)


def test_a_device_that_has_enough_is_not_refused() -> None:
    free = free_bytes("cpu")
    assert free is None or 0 < free < 10**15
    check_memory([Need("a byte", 1), Need("another", 1)], "cpu")
    check_memory([Need("anything", HUGE)], "meta")
    check_memory([Need("ten bytes", 10)], "cpu", free=10)


@tells_free_memory
def test_a_refusal_says_what_is_needed_what_is_free_and_what_to_lower() -> None:
    needs = [Need("the weights", 10**9), Need("a step", HUGE, "lower --batch-size")]
    with pytest.raises(ValueError) as caught:
        check_memory(needs, "cpu")
    message = str(caught.value)
    assert message.startswith("cpu has ") and "\n" not in message
    assert "a step 1,000,000,000.0 GB, the weights 1.0 GB): lower --batch-size" in message
    with pytest.raises(ValueError, match=r"has 1\.0 MB of free .*: choose another --device"):
        check_memory([Need("the weights", HUGE)], "cpu", free=10**6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_that_runs_out_all_the_same_ends_in_one_sentence(device: str) -> None:
    with pytest.raises(ValueError) as caught, explained("lower --batch-size"):
        torch.empty(2**50, dtype=torch.uint8, device=device)
    message = str(caught.value)
    assert message.startswith("memory ran out") and message.endswith(": lower --batch-size")
    assert "\n" not in message
    assert ("of the GPU's in use" in message) == torch.cuda.is_available()


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="must match"), explained("lower --batch-size"):
        torch.ones(2) + torch.ones(3)


@pytest.mark.gpu
def test_what_the_allocator_holds_unused_counts_as_free() -> None:
    before = free_bytes("cuda")
    frozen_weights = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    assert before - free_bytes("cuda") >= 2**28
    del frozen_weights
    assert abs(free_bytes("cuda") - before) < 2**26


def needs_of(wan: WanConfig, tokens: int, stream_bytes: int = 4, **changes: Any) -> dict[str, int]:
    numbers = ("weight_bytes", "num_trained", "sampled_together")
    settings = {**dict.fromkeys(numbers, 0), "batch_size": 1}
    settings |= {"is_checkpointed": False, "precision": "fp32", **changes}
    sizes = {name: getattr(wan, name) for name in ("dim", "ffn_dim", "num_layers")}
    model = Transformer(**sizes, num_tokens=tokens, stream_bytes=stream_bytes)
    return {need.what: need.num_bytes for need in training_needs(model, **settings)}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parameters", ["feature_maps", "lora"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_activations_are_a_lower_bound_of_what_autograd_keeps_and_not_a_loose_one(
    frozen: str, parameters: str, precision: str, is_checkpointed: bool, teacher: Teacher
) -> None:
    for name, parameter in list(teacher.model.named_parameters()):
        place(teacher.model, name, parameter.detach(), frozen)
    teacher.model.requires_grad_(False)
    student = Student(teacher, StudentConfig(parameters=parameters, lora_rank=2), seed=0)
    for module in student.mixed.values():
        module.mode = "softmax"
    if is_checkpointed:
        checkpoint_activations(student.model, student.sites)
    own = {parameter.data_ptr() for parameter in student.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latents = torch.randn(1, 4, 4, 24, 24).requires_grad_()
    velocity_fn = bind(student.model, torch.randn(1, 5, TEXT_DIM), precision=precision)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity_fn(latents, torch.tensor([0.5]))
    stream_bytes = 4 if frozen == "fp32" else 2
    settings = {"precision": precision, "is_checkpointed": is_checkpointed}
    settings |= {"stream_bytes": stream_bytes}
    wan = teacher.model.config
    estimate = needs_of(wan, 4 * 12 * 12, **settings)["a training step's activations"]
    if is_checkpointed:
        # The block at work is recomputed in the backward pass, which does not run here.
        one = dataclasses.replace(wan, num_layers=1)
        one_block = needs_of(one, 4 * 12 * 12, precision=precision, stream_bytes=stream_bytes)
        estimate -= one_block["a training step's activations"]
    found = sum(kept.values())
    assert estimate <= found <= 2.5 * estimate, found / estimate


def test_several_processes_hold_their_part_of_the_weights_and_whole_ones_while_sampling() -> None:
    wan = WanConfig(num_layers=40)
    given = {"weight_bytes": 40_000, "num_trained": 4_000, "num_processes": 4}
    training = needs_of(wan, 100, **given)
    assert training["the weights"] == 40_000 // 4 + 2 * 1_000
    alone = needs_of(wan, 100, num_trained=4_000)["what is trained, with its optimiser"]
    assert training["what is trained, with its optimiser"] == alone // 4 > 0
    sampling = needs_of(wan, 100, **given | {"weight_bytes": 10**12})
    assert list(sampling) == ["the weights", "the sampling of the teacher"]
    assert sampling["the weights"] == 10**12


def test_what_is_trained_counts_as_the_student_frees_it(teacher: Teacher) -> None:
    shapes = {name: tuple(p.shape) for name, p in teacher.model.named_parameters()}
    with Student(teacher, StudentConfig(lora_rank=3), seed=0) as student:
        weights = student.weights.values()
        assert count_low_rank(shapes, "blocks.", 3) == sum(p.numel() for p in weights)
    with Student(teacher, StudentConfig(parameters="full"), seed=0) as full:
        assert count(shapes, "blocks.") == sum(p.numel() for p in full.weights.values())
    assert count(shapes) == sum(p.numel() for p in teacher.model.parameters())


def test_sampling_and_training_do_not_add_up() -> None:
    few, many = (
        needs_of(WanConfig(), 32760, num_trained=10**6, sampled_together=n) for n in (1, 64)
    )
    assert "the sampling of the teacher" in many and "the sampling of the teacher" not in few


def test_wan_14b_at_480p_needs_more_than_a_home_card_and_less_than_a_node() -> None:
    wan = WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    sizes = {"weight_bytes": 4 * 14_288_491_584, "num_trained": 10**8, "precision": "bf16"}
    needs = needs_of(wan, 32760, is_checkpointed=True, **sizes)
    assert 48e9 < sum(needs.values()) < 140e9


@pytest.fixture
def files(teacher: Teacher, tmp_path: Path) -> dict[str, Any]:
    paths = save_inputs(teacher, tmp_path)
    return {
        "model": paths["--model"],
        "prompts": paths["--prompts"],
        "target": 1,
        "lora_rank": 2,
        "device": "cpu",
        "precision": "fp32",
        "out": tmp_path / "run",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 2**20 - 3, "shard_size": 1}, "lower --batch-size"),
        ({"batch_size": 10**9}, "lower --batch-size, give --activation-checkpointing"),
        ({"shard_size": 10**6, "num_trajectories": 10**6}, "lower --shard-size"),
    ],
)
@tells_free_memory
def test_a_transfer_that_cannot_fit_is_refused_before_anything_is_made(
    changes: dict[str, Any], words: str, files: dict[str, Any]
) -> None:
    values = {"evaluate_samples": 0, **files, **changes}
    with pytest.raises(ValueError) as caught:
        transfer.run(override(TransferConfig(), values))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not files["out"].exists()


@tells_free_memory
def test_a_distillation_that_cannot_fit_is_refused_before_anything_is_made(
    files: dict[str, Any], linearized: Artifact, tmp_path: Path
) -> None:
    save(linearized, tmp_path / "linearized.safetensors")
    del files["target"]
    config = distill.DistillConfig(artifact=tmp_path / "linearized.safetensors")
    config = override(config, {**files, "evaluate_samples": 0, "batch_size": 10**9})
    with pytest.raises(ValueError, match="lower --batch-size"):
        distill.run(config)
    assert not config.out.exists()


def plan_of(name: str, batch_size: int) -> Plan:
    """Return the plan of a transfer at a real size, LoRA of rank 32."""
    size = SIZES[name]
    with torch.device("meta"):
        shapes = shapes_of(WanModel(size.config))
    maps = size.config.num_layers * size.config.dim * 128
    return Plan(
        config=size.config,
        shapes=shapes,
        num_tokens=size.tokens,
        num_trained=count_low_rank(shapes, "blocks.", 32) + maps,
        batch_size=batch_size,
        sampled_together=1,
        precision="bf16",
    )


CHECKPOINTED = "{activation_checkpointing}"


@pytest.mark.parametrize(
    ("gpu_gb", "cpu_gb", "may_offload", "flags"),
    [
        (100, 1000, True, CHECKPOINTED),
        (60, 1000, True, f"{CHECKPOINTED} {{frozen}} bf16"),
        (48, 1000, True, f"{CHECKPOINTED} {{frozen}} bf16 {{offload_blocks}} 8"),
        (20, 1000, True, ""),
        (40, 20, True, f"{CHECKPOINTED} {{frozen}} fp8"),
        (30, 20, True, f"{CHECKPOINTED} {{frozen}} fp8 {{offload_blocks}} 24"),
        (30, 20, False, ""),
    ],
)
def test_a_plan_finds_the_flags_that_cost_least_of_those_that_fit_both_memories(
    gpu_gb: int, cpu_gb: int, may_offload: bool, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cpu": int(cpu_gb * 1e9), "cuda": int(gpu_gb * 1e9)}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[str(device)])
    plan = plan_of("14b-480p", 1)
    assert plan.find_flags(FrozenConfig(), [], "cuda", may_offload=may_offload) == flags


def test_page_locked_blocks_count_as_what_they_really_take(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"frozen": "bf16", "offload_blocks": 3, "activation_checkpointing": True}
    config = override(TransferConfig(), {**files, **values, "evaluate_samples": 0})
    checkpoint = open_teacher(config.teacher)
    block = count_frozen_bytes(checkpoint.shapes, "bf16", "blocks.0.")
    assert count_frozen_bytes(checkpoint.shapes, "bf16") < 3 * 2**19 and block < 2**19
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 2**19 - 1)
    with pytest.raises(ValueError, match=r"page-locked 1\.6 MB.*lower --offload-blocks"):
        check_transfer(checkpoint, config, "cuda", "bf16")


def test_memory_is_that_of_the_largest_size(files: dict[str, Any]) -> None:
    config = override(TransferConfig(), {**files, "evaluate_samples": 0, "num_trajectories": 1})
    large = {"width": 96, "height": 64, "num_frames": 9}
    small = {"width": 32, "height": 32, "num_frames": 1}

    def count_bytes(main: dict[str, int], *others: dict[str, int]) -> int:
        checkpoint = open_teacher(override(config.teacher, main), others)
        return check_transfer(checkpoint, config, "cpu", "fp32").memory_bytes

    assert count_bytes(small) < count_bytes(small, large) == count_bytes(large, small)
    assert count_bytes(large) == count_bytes(large, small)


def test_a_refused_transfer_is_told_with_which_flags_it_would_fit(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(TransferConfig(), {**files, "evaluate_samples": 0, "num_trajectories": 1})
    checkpoint = open_teacher(config.teacher)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    check_transfer(checkpoint, config, "cpu", "fp32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_500_000_000)
    with pytest.raises(ValueError, match="it would fit with --activation-checkpointing") as caught:
        check_transfer(checkpoint, config, "cpu", "fp32")
    assert "\n" not in str(caught.value)
