"""A digest knows the same weights again; a sketch tells how far others are, however rounded."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.base_weights import (
    SKETCH_SIZE,
    BaseWeights,
    base_weights_of,
    compare_weights,
    sketch,
    sketched_rows,
    sketched_weights,
    weights_digest,
)
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanModel
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_teacher(TeacherConfig()).model


def base_of(model: nn.Module) -> BaseWeights:
    return base_weights_of(model, *identify(shapes_of(model)))


def changed(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = change(parameter.data)
    return other


def rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.to(dtype).float()


def rounded_in_steps(num_steps: int) -> Callable[[Tensor], Tensor]:
    """Round a tensor to whole multiples of its largest value over `num_steps`."""

    def change(weight: Tensor) -> Tensor:
        step = weight.abs().max() / num_steps
        return (weight / step).round() * step

    return change


def rounded_in_blocks(weight: Tensor) -> Tensor:
    """Round blocks of 32 to 4 bits, as GGUF's Q4 does."""
    if weight.numel() % 32:
        return weight
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / step).round() * step).nan_to_num().reshape(weight.shape)


def finetuned(amount: float, *, rank: int = 0) -> Callable[[Tensor], Tensor]:
    """Change a tensor by `amount` of its norm, a matrix by a low-rank one if `rank` is given."""
    generator = torch.Generator().manual_seed(3)

    def change(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        if rank and weight.ndim == 2:
            factors = ((weight.shape[0], rank), (rank, weight.shape[1]))
            noise = torch.mm(*(torch.randn(shape, generator=generator) for shape in factors))
        return weight + amount * weight.norm() / noise.norm() * noise

    return change


def random(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))


ROUNDINGS = {
    "fp16": (rounded(torch.float16), 16, "same"),
    "bf16": (rounded(torch.bfloat16), 16, "same"),
    "fp8": (rounded(torch.float8_e4m3fn), 8, "close"),
    "fp8_e5m2": (rounded(torch.float8_e5m2), 8, "close"),
    "int8": (rounded_in_steps(127), 8, "close"),
    "4 bits": (rounded_in_blocks, 4.5, "close"),
    "a weak LoRA": (finetuned(0.02, rank=8), 16, "close"),
    "a strong LoRA": (finetuned(0.3, rank=8), 16, "other"),
    "another finetune, in fp8": (finetuned(0.3), 8, "other"),
    "other weights": (random, 16, "other"),
    "other weights, in 4 bits": (random, 4.5, "other"),
}


@pytest.mark.parametrize(("change", "bits", "kind"), ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_rounding_is_told_from_other_weights(
    model: nn.Module, change: Callable[[Tensor], Tensor], bits: float, kind: str
) -> None:
    other = changed(model, change)
    found = BaseWeights(sketch=base_of(other).sketch, bits=bits)
    match = compare_weights(base_of(model), found)
    assert match.kind == kind
    names = sketched_weights(*identify(shapes_of(model)))
    pairs = [(model.get_parameter(name), other.get_parameter(name)) for name in names]
    true = math.sqrt(
        sum(float((a / a.norm() - b / b.norm()).square().sum()) for a, b in pairs) / len(pairs)
    )
    assert match.distance == pytest.approx(true, rel=0.25, abs=1e-4)
    assert kind == "same" or f"are about {100 * match.distance:.2g} % off those" in str(match)
    assert ("another finetune, or the other one of two experts" in str(match)) == (kind == "other")


def test_without_a_sketch_only_plain_weights_are_known_to_be_others(model: nn.Module) -> None:
    base = base_of(model)
    plain = dataclasses.replace(base, sketch=())
    assert compare_weights(plain, BaseWeights(digest=base.digest)).kind == "same"
    assert compare_weights(plain, BaseWeights(digest="0" * 16)).kind == "other"
    assert compare_weights(plain, BaseWeights(digest="0" * 16, bits=8)).kind == "unknown"
    assert compare_weights(plain, BaseWeights(sketch=base.sketch)).kind == "unknown"
    assert compare_weights(base, BaseWeights()).kind == "unknown"


def test_a_digest_tells_weights_and_not_the_order_in_which_a_layer_registers_them(
    wan: WanModel,
) -> None:
    _, sites = identify(shapes_of(wan))
    digest = weights_digest(wan, sites)
    other = copy.deepcopy(wan)
    for module in other.blocks.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("weight", module._parameters.pop("weight"))
    assert next(other.blocks[0].self_attn.named_parameters())[0] == "q.bias"
    assert weights_digest(other, sites) == digest and len(bytes.fromhex(digest)) == 8
    other.blocks[2].self_attn.k.weight.data += 0.01
    assert weights_digest(other, sites) != digest


def test_a_sketch_is_of_fixed_numbers_whatever_the_dtype() -> None:
    weight = torch.arange(-5000.0, 5000.0).reshape(100, 100)
    found = sketch([weight, weight.T])
    assert len(found) == SKETCH_SIZE and found == sketch([weight.double(), weight.T])
    assert found[:3] == (0.01559, -0.1403, 0.14022)
    assert found == sketch([2 * weight, weight.T])


def test_large_weights_are_looked_at_in_evenly_spread_rows() -> None:
    rows = range(5120)[sketched_rows((5120, 5120))]
    assert len(rows) * 5120 < 2**18 + 5120 and rows[-1] > 5000
    assert range(128)[sketched_rows((128, 128))] == range(128)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), 0.0])
def test_what_has_no_norm_has_no_sketch(fault: float) -> None:
    assert sketch([torch.ones(4, 4), torch.full((4, 4), fault)]) == ()
