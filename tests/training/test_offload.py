"""A block whose weights wait in CPU memory computes what it does with its own, to the last bit."""

import copy
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core import artifact
from linvideo_core.distill import command as distill
from linvideo_core.models.attention_sites import checkpoint_activations
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.config import FROZEN
from linvideo_core.run.config import override
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import StudentConfig, TransferConfig
from linvideo_core.transfer.student import Student
from tests.allocations import peak_bytes
from tests.conftest import (
    LATENT_SHAPE,
    TEXT_DIM,
    Recorder,
    make_teacher,
    make_wan,
    small_transfer,
)

Inputs = tuple[Tensor, Tensor, Tensor]
TEACHER_FIELDS = ("model", "prompts", "num_frames", "height", "width")


@pytest.fixture(params=FROZEN)
def frozen_weights(request: pytest.FixtureRequest, teacher: Teacher, tmp_path: Path) -> Teacher:
    """The tiny teacher, its weights held in every way."""
    save_file(teacher.model.state_dict(), tmp_path / "wan.safetensors")
    model = load_wan(tmp_path / "wan.safetensors", frozen=request.param)
    teacher.model = model.eval().requires_grad_(False)
    return teacher


def move(teacher: Teacher, num_blocks: int, device: str = "cpu") -> Teacher:
    """Return the teacher on a device, some blocks of a copy of it offloaded."""
    own = copy.copy(teacher)
    own.model, own.offload_blocks = copy.deepcopy(teacher.model), num_blocks
    return own.to(device)


def gradients(teacher: Teacher, inputs: Inputs, parameters: str) -> dict[str, Tensor]:
    """Return the loss and the gradients of a student whose layers are all mixed."""
    with make_student(teacher, parameters) as student:
        model, device = student.model, teacher.prompt_embeds.device
        loss = model(*(x.to(device) for x in inputs)).square().mean()
        loss.backward()
        found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().cpu(), **found}


def make_student(teacher: Teacher, parameters: str) -> Student:
    student = Student(teacher, StudentConfig(parameters=parameters, lora_rank=2), seed=0)
    for module in student.mixed.values():
        torch.nn.init.constant_(module.layer_score, 0.5)
    for name, weight in student.weights.items():
        if name.endswith("up"):
            torch.nn.init.constant_(weight, 0.01)
    checkpoint_activations(student.model, student.sites)
    return student


@pytest.mark.parametrize(
    ("num_blocks", "parameters"), [(1, "lora"), (2, "feature_maps"), (3, "lora")]
)
def test_loss_and_gradients_are_the_same_bit_for_bit(
    num_blocks: int, parameters: str, frozen_weights: Teacher, inputs: Inputs
) -> None:
    expected = gradients(frozen_weights, inputs, parameters)
    found = gradients(move(frozen_weights, num_blocks), inputs, parameters)
    assert found.keys() == expected.keys() and len(found) > 3
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_device_computes_the_same_with_offloaded_blocks(
    num_blocks: int, frozen_weights: Teacher, inputs: Inputs
) -> None:
    expected = gradients(move(frozen_weights, 0, "cuda"), inputs, "lora")
    own = move(frozen_weights, num_blocks, "cuda")
    assert all(p.is_cpu and p.is_pinned() for p in own.model.blocks[0].parameters())
    for _ in range(3):
        found = gradients(own, inputs, "lora")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_a_student_on_offloaded_blocks_is_its_teacher_while_disabled(
    teacher: Teacher, inputs: Inputs
) -> None:
    own = move(teacher, 2)
    expected = own.model(*inputs)
    with Student(own, StudentConfig(lora_rank=2), seed=0) as student:
        student.harden([0, 1, 2])
        assert not torch.equal(student.model(*inputs), expected)
        with student.disabled():
            assert torch.equal(own.model(*inputs), expected)
    assert torch.equal(own.model(*inputs), expected)
    assert torch.equal(expected, teacher.model(*inputs))


@pytest.mark.parametrize("num_blocks", [1, 5])
def test_no_more_than_two_blocks_at_a_time_are_there(num_blocks: int) -> None:
    teacher = make_teacher(make_wan(num_layers=5))
    inputs = torch.randn(1, *LATENT_SHAPE), torch.tensor([500.0]), torch.randn(1, 5, TEXT_DIM)
    own = move(teacher, num_blocks)
    block = sum(p.nbytes for p in teacher.model.blocks[0].parameters())
    peaks = []
    for each in (teacher, own):
        model = make_student(each, "feature_maps").model
        peaks.append(peak_bytes(lambda model=model: model(*inputs).square().mean().backward()))
    assert 0 < peaks[1] - peaks[0] < 2.2 * block


@pytest.mark.gpu
def test_a_device_holds_no_more_than_two_blocks_at_a_time() -> None:
    teacher = make_teacher(make_wan(num_layers=8, num_heads=4))
    inputs = torch.randn(1, *LATENT_SHAPE), torch.tensor([500.0]), torch.randn(1, 5, TEXT_DIM)
    inputs = tuple(x.cuda() for x in inputs)
    block = sum(p.nbytes for p in teacher.model.blocks[0].parameters())
    peaks = []
    for num_blocks in (0, 8):
        # Models hold themselves in cycles, also those of other tests.
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = make_student(move(teacher, num_blocks, "cuda"), "feature_maps").model
        model(*inputs).square().mean().backward()
        torch.cuda.reset_peak_memory_stats()
        model(*inputs).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert peaks[0] - peaks[1] > 5.5 * block


class StopError(Exception):
    """Stands for an interruption."""


def test_what_was_copied_ahead_is_not_used_when_it_is_out_of_date(
    teacher: Teacher, linearized: artifact.Artifact, inputs: Inputs
) -> None:
    own = move(teacher, 3)
    before = own.model(*inputs)
    student = make_student(own, "feature_maps")
    calls = itertools.count()

    def fail_on_the_way_back(*_: object) -> None:
        if next(calls) == 1:
            raise StopError

    student.model.blocks[1].self_attn.register_forward_hook(fail_on_the_way_back)
    with pytest.raises(StopError):
        student.model(*inputs).square().mean().backward()
    student.remove()
    # Block 0 would have been next. A file changes weights in place.
    with artifact.apply(linearized, own.model):
        found = own.model(*inputs)
    with artifact.apply(linearized, teacher.model):
        assert torch.equal(found, teacher.model(*inputs))
    assert torch.equal(own.model(*inputs), before)


@pytest.fixture
def config(tmp_path: Path) -> TransferConfig:
    save_file(make_wan().state_dict(), tmp_path / "wan.safetensors")
    values = {"steps": 4, "checkpoint_every": 2, "activation_checkpointing": True}
    return small_transfer(tmp_path / "wan.safetensors", **values)


def test_a_transfer_and_a_distillation_with_offloaded_blocks_make_the_same_files(
    config: TransferConfig, tmp_path: Path
) -> None:
    made = {}
    few = {"sampler_steps": 2, "warm_start_steps": 1, "steps": 2, "num_trajectories": 2}
    few |= {"batch_size": 4, "evaluate_samples": 0, "frozen": "fp8"}
    of_teacher = {name: getattr(config.teacher, name) for name in TEACHER_FIELDS}
    distilled = {"states_per_trajectory": 2, "lora_rank": 2, "activation_checkpointing": True}
    for num_blocks in (0, 2):
        values = {**few, "offload_blocks": num_blocks}
        first = transfer.run(override(config, {**values, "out": tmp_path / f"t{num_blocks}"}))
        values |= {**of_teacher, **distilled, "device": "cpu", "out": tmp_path / f"d{num_blocks}"}
        second = distill.run(override(distill.DistillConfig(artifact=first), values))
        made[num_blocks] = [load_file(path) for path in (first, second)]
    for one, other in zip(made[0], made[2], strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_a_run_is_continued_with_another_number_of_offloaded_blocks(
    config: TransferConfig, tmp_path: Path
) -> None:
    config = override(config, {"frozen": "bf16", "evaluate_samples": 0, "warm_start_steps": 1})
    whole = transfer.run(override(config, {"out": tmp_path / "whole"}))
    broken = override(config, {"out": tmp_path / "broken", "offload_blocks": 3})
    with pytest.raises(KeyboardInterrupt):
        transfer.run(broken, Recorder(stop_at=("training", 3)))
    resumed = transfer.run(override(broken, {"offload_blocks": 1}))
    expected, found = load_file(whole), load_file(resumed)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offload_blocks": 4}, "has 3 blocks"),
        ({"offload_blocks": 1, "compile": True}, "--compile given"),
        ({"offload_blocks": 1, "activation_checkpointing": False}, "give both"),
        ({"offload_blocks": 1, "low_noise_model": Path("low")}, "with --low-noise-model"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    changes: dict[str, Any], words: str, config: TransferConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        transfer.run(override(config, {**changes, "out": tmp_path / "never"}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()
