"""Frozen weights in fewer bytes: near the model they were rounded from, and one with its file."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.flow import bind
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.base_weights import weights_digest
from linvideo_core.models.checkpoint import load_wan, open_wan
from linvideo_core.models.config import FROZEN
from linvideo_core.models.families import identify
from linvideo_core.models.quantized import Float8Linear, count_frozen_bytes
from linvideo_core.models.wan import WanModel
from linvideo_core.run.config import override
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, load_teacher
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import StudentConfig
from linvideo_core.transfer.student import Student
from tests.conftest import make_teacher, save_inputs, small_transfer

# Of the velocity, in its norm, against fp32: bf16 has 8 bits, e4m3 4.
TOLERANCE = {"fp32": 0.0, "bf16": 0.02, "fp8": 0.1}
ROUNDED = ("bf16", "fp8")

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def path(wan: WanModel, tmp_path: Path) -> Path:
    save_file(wan.state_dict(), tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rounded_model_predicts_what_the_whole_one_does_within_its_tolerance(
    frozen: str, precision: str, path: Path, wan: WanModel, inputs: Inputs
) -> None:
    wan.requires_grad_(False)
    latents, timesteps, embeds = inputs
    sigma = timesteps / 1000
    expected = bind(wan, embeds, precision=precision)(latents, sigma)
    model = load_wan(path, frozen=frozen).requires_grad_(False)
    found = bind(model, embeds, precision=precision)(latents, sigma)
    assert found.dtype == torch.float32
    assert relative(found, expected) <= TOLERANCE[frozen]


def test_only_the_matrices_of_blocks_are_fp8_and_all_else_is_bf16(path: Path) -> None:
    model = load_wan(path, frozen="fp8")
    narrow = {n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert narrow == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    assert {p.dtype for p in model.parameters()} == {torch.float8_e4m3fn, torch.bfloat16}
    assert shapes_of(model) == shapes_of(load_wan(path))


def test_fp8_is_exact_in_bf16_and_within_a_sixteenth_of_every_weight() -> None:
    weight = torch.randn(33, 47) * torch.logspace(-3, 3, 33).unsqueeze(1)
    weight[5] = 0
    layer = Float8Linear(weight, None)
    assert torch.equal(layer.scale.log2(), layer.scale.log2().round())
    wide = layer(torch.eye(47)).T
    assert torch.equal(layer(torch.eye(47).bfloat16()).T.float(), wide)
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((wide - weight).abs() <= weight.abs() / 16 + largest * 2**-17).all()


def test_the_gradient_of_fp8_reaches_the_input_alone_and_keeps_no_wide_weight() -> None:
    layer, x = Float8Linear(torch.randn(6, 8), torch.randn(6)), torch.randn(3, 8).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 6) @ (layer.weight.float() * layer.scale))
    assert {t.dtype for t in kept if t.numel() == 48} == {torch.float8_e4m3fn}


@pytest.mark.parametrize("frozen", FROZEN)
def test_bytes_are_counted_as_they_are_held(frozen: str, path: Path) -> None:
    model = load_wan(path, frozen=frozen)
    frozen_weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert frozen_weights == count_frozen_bytes(shapes_of(model), frozen)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("frozen", ROUNDED)
def test_a_rounded_model_goes_by_the_digest_of_its_checkpoint(
    frozen: str, stored: torch.dtype, wan: WanModel, tmp_path: Path
) -> None:
    paths = save_inputs(make_teacher(wan.to(stored)), tmp_path)
    config = TeacherConfig(model=paths["--model"], prompts=paths["--prompts"])
    whole = load_teacher(config).model
    rounded = load_teacher(override(config, {"frozen": frozen})).model
    _, sites = identify(shapes_of(whole))
    assert weights_digest(copy.deepcopy(rounded), sites) == weights_digest(whole, sites)


@pytest.mark.parametrize("frozen", ROUNDED)
def test_a_file_changes_a_rounded_model_as_a_whole_one_and_is_taken_out_bit_for_bit(
    frozen: str, path: Path, linearized: artifact.Artifact, teacher: Teacher, inputs: Inputs
) -> None:
    model = load_wan(path, frozen=frozen).requires_grad_(False)
    before, whole_before = model(*inputs), teacher.model(*inputs)
    with artifact.apply(linearized, model), artifact.apply(linearized, teacher.model):
        expected, found = teacher.model(*inputs), model(*inputs)
    assert relative(found, expected) <= TOLERANCE[frozen]
    change = expected - whole_before
    assert relative(found - before, change) < 0.5 < relative(torch.zeros_like(change), change)
    assert torch.equal(model(*inputs), before)


@pytest.mark.parametrize(
    ("frozen", "parameters"), [("fp32", "lora"), ("bf16", "feature_maps"), ("fp8", "lora")]
)
def test_a_transfer_of_a_rounded_model_makes_a_file_for_the_whole_one(
    frozen: str, parameters: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = artifact.load(
        transfer.run(small_transfer(path, frozen=frozen, parameters=parameters, evaluate_samples=0))
    )
    assert made.header.provenance.get("frozen", "fp32") == frozen
    model = load_wan(path)
    assert artifact.check(made, shapes_of(model))
    with artifact.apply(made, model):
        assert "other weights" not in caplog.text


def test_a_rounded_transfer_is_compared_with_its_rounded_teacher(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_transfer(path, frozen="fp8")
    transfer.run(config)
    assert (config.out / "evaluation.json").exists() and "other weights" not in caplog.text
    with pytest.raises(ValueError, match="was made with --frozen fp8 and this run has bf16"):
        transfer.run(override(config, {"frozen": "bf16"}))


def test_of_a_checkpoint_only_what_lies_under_the_prefixes_is_read(path: Path) -> None:
    part = open_wan(path).load(under=["blocks.0.self_attn."])
    read = {name for name, p in part.named_parameters() if not p.is_meta}
    assert read == {n for n in shapes_of(part) if n.startswith("blocks.0.self_attn.")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen": "bf16", "parameters": "full"}, "with --parameters full"),
        ({"frozen": "fp8", "model": None, "prompts": None}, "and none was given: give --model"),
        ({"offload_blocks": 1}, "without --activation-checkpointing"),
        ({"offload_blocks": -1}, "a whole number from 0 to 1000"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], words: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        small_transfer(path, **changes)
    assert "\n" not in str(caught.value)


def test_a_student_on_fp8_learns_in_fp32(path: Path, teacher: Teacher) -> None:
    rounded = copy.copy(teacher)
    rounded.model = load_wan(path, frozen="fp8").eval().requires_grad_(False)
    student, whole = (Student(t, StudentConfig(lora_rank=2), seed=0) for t in (rounded, teacher))
    assert student.weights.keys() == whole.weights.keys()
    assert {p.dtype for p in student.weights.values()} == {torch.float32}
