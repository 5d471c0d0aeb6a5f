"""Low-rank changes start at nothing and leave the layer's own names alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.models import lora
from linvideo_core.models.wan import WanModel


@pytest.mark.parametrize(("rank", "is_merged"), [(4, False), (32, True)])
def test_a_change_is_up_times_down_added_to_the_weight_in_value_and_gradient(
    wan: WanModel, inputs: tuple[Tensor, ...], rank: int, is_merged: bool
) -> None:
    merged = copy.deepcopy(wan)
    before = {name for name, _ in wan.named_parameters()}
    changes = lora.attach(wan.requires_grad_(False), "blocks.", rank, seed=0)
    layers = [wan.get_submodule(name) for name in changes]
    assert all(isinstance(layer, lora.MergedLinear) == is_merged for layer in layers)
    # It starts at zero.
    torch.testing.assert_close(wan(*inputs), merged(*inputs), rtol=0, atol=0)
    torch.manual_seed(2)
    for name, change in changes.items():
        change.up.data.normal_(std=0.02)
        merged.get_submodule(name).weight.data += (change.up @ change.down).detach()
    outputs = [model(*inputs) for model in (wan, merged)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    # The layers' own parameters keep their names, and the changes alone get a gradient.
    assert {name for name, _ in wan.named_parameters() if ".lora." not in name} == before
    for name, parameter in wan.named_parameters():
        assert (parameter.grad is not None) == (".lora." in name), name
    for name, change in changes.items():
        gradient = merged.get_submodule(name).weight.grad
        for found, expected in (
            (change.up.grad, gradient @ change.down.T),
            (change.down.grad, change.up.T @ gradient),
        ):
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_every_linear_layer_under_the_prefix_is_changed_but_those_that_are_to_stay(
    wan: WanModel,
) -> None:
    linear = [n for n, m in wan.named_modules() if isinstance(m, nn.Linear)]
    wanted = [n for n in linear if n.startswith("blocks.") and not n.endswith(".ffn.0")]
    changes = lora.attach(wan, "blocks.", 4, seed=0, is_frozen=lambda name: ".ffn.0." in name)
    assert list(changes) == wanted and len(changes) == 3 * 9
    assert not hasattr(wan.blocks[0].ffn[0], "lora")


@pytest.mark.parametrize("rank", [4, 32])
def test_attached_layers_are_frozen_and_their_changes_are_not(wan: WanModel, rank: int) -> None:
    changes = lora.attach(wan, "blocks.", rank, seed=0)
    assert not any(wan.get_submodule(name).weight.requires_grad for name in changes)
    added = {n: p for n, p in wan.named_parameters() if ".lora." in n}
    assert all(parameter.requires_grad for parameter in added.values())
    assert all(name.endswith((".lora.down", ".lora.up")) for name in added)


def test_the_seed_decides_the_start(wan: WanModel) -> None:
    starts = [lora.attach(copy.deepcopy(wan), "blocks.", 4, seed=seed) for seed in (0, 0, 1)]
    name = "blocks.1.ffn.0"
    first, again, other = (start[name].down for start in starts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 128)
    assert starts[0][name].up.shape == (96, 4)


@pytest.mark.parametrize("rank", [4, 32])
def test_a_change_is_kept_in_fp32_and_acts_in_the_layers_dtype(wan: WanModel, rank: int) -> None:
    changes = lora.attach(wan.bfloat16(), "blocks.", rank, seed=0)
    assert {p.dtype for change in changes.values() for p in change.parameters()} == {torch.float32}
    layer = wan.blocks[0].ffn[0]
    assert layer(torch.ones(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_rank_beyond_the_full_rank_is_refused_with_the_layers_name(wan: WanModel) -> None:
    lora.attach(copy.deepcopy(wan), "blocks.", 96, seed=0)
    with pytest.raises(ValueError, match=r"--lora-rank 97 exceeds 96, the full rank of blocks.0"):
        lora.attach(wan, "blocks.", 97, seed=0)
