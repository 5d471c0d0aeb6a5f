"""Attention sites are found by name and shape, changed, and given back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.kernels.tiles import TokenGrid
from linvideo_core.models import attention_sites
from linvideo_core.models.attention import SoftmaxAttention
from linvideo_core.models.families import FAMILIES, identify
from linvideo_core.models.wan import WanConfig, WanModel


class Nothing(nn.Module):
    """Attention that pays none."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(query)


def sites_of(model: nn.Module) -> list[attention_sites.AttentionSite]:
    return identify(attention_sites.shapes_of(model))[1]


@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (2, 12), (40, 40)])
def test_sites_are_found_in_depth_order(num_heads: int, num_layers: int) -> None:
    with torch.device("meta"):
        config = WanConfig(dim=128 * num_heads, num_heads=num_heads, num_layers=num_layers)
        model = WanModel(config)
    shapes = dict(sorted(attention_sites.shapes_of(model).items()))
    family, sites = identify(shapes)
    assert family.name == "wan"
    assert [site.layer for site in sites] == list(range(num_layers))
    assert [site.name for site in sites] == [f"blocks.{i}.self_attn" for i in range(num_layers)]
    assert {(site.num_heads, site.head_dim) for site in sites} == {(num_heads, 128)}


def minimax_h3_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a published MiniMax-H3 that tell its family and layers."""
    attention = {"qkv_proj.weight": (3 * 56 * 128, 5376), "q_norm.weight": (128,)}
    places = ["token_refiner.blocks.0", *(f"blocks.{i}" for i in reversed(range(num_layers)))]
    shapes = {f"{place}.attn.{name}": s for place in places for name, s in attention.items()}
    return {"video_patch_proj.weight": (5376, 96), "audio_patch_proj.weight": (5376, 32), **shapes}


def test_minimax_h3_has_its_main_blocks_alone_as_sites_and_trains_no_modulation() -> None:
    family, sites = identify(minimax_h3_shapes(50))
    assert attention_sites.fingerprint(family, sites) == "minimax_h3, 50 layers, 56 heads of 128"
    assert [site.name for site in sites] == [f"blocks.{i}.attn" for i in range(50)]
    shapes = minimax_h3_shapes(2) | {"blocks.0.adaln_proj.linear.weight": (96768, 24)}
    own = ("qkv_proj.weight", "q_norm.weight")
    # Modulations are not trained.
    names = {f"blocks.{i}.attn.{name}" for i in range(2) for name in own}
    assert set(family.trainable(shapes)) == names
    # Layers of the same names without both streams are those of another model.
    del shapes["audio_patch_proj.weight"]
    with pytest.raises(ValueError, match="minimax_h3"):
        identify(shapes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 3),
        lambda: nn.TransformerEncoderLayer(16, 2),
        lambda: nn.Module(),
        lambda: WanModel(WanConfig(dim=96, num_heads=1, num_layers=1, ffn_dim=8, text_dim=8)),
    ],
)
def test_a_stranger_is_refused_with_the_known_families(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="known family") as caught:
        sites_of(make())
    assert all(family.name in str(caught.value) for family in FAMILIES)


def test_install_takes_effect_and_restore_gives_back_the_same_modules(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    sites = sites_of(wan)
    before = wan(*inputs)
    modules = [attention_sites.attention_at(wan, site) for site in sites]
    names = [name for name, _ in wan.named_parameters()]
    originals = attention_sites.install(wan, sites, lambda site: Nothing())
    assert all(isinstance(attention_sites.attention_at(wan, site), Nothing) for site in sites)
    assert not torch.equal(wan(*inputs), before)
    attention_sites.restore(wan, sites, originals)
    assert [attention_sites.attention_at(wan, site) for site in sites] == modules
    assert [name for name, _ in wan.named_parameters()] == names
    torch.testing.assert_close(wan(*inputs), before, rtol=0, atol=0)


def test_install_touches_only_the_sites_it_is_given(wan: WanModel) -> None:
    sites = sites_of(wan)
    assert list(attention_sites.install(wan, sites[1:2], lambda site: Nothing())) == [1]
    kinds = [type(attention_sites.attention_at(wan, site)) for site in sites]
    assert kinds == [SoftmaxAttention, Nothing, SoftmaxAttention]
    assert isinstance(wan.blocks[1].cross_attn.attention, SoftmaxAttention)


def test_installed_attention_sees_heads_and_the_grid_of_tokens(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    shapes: list[tuple[int, ...]] = []
    grids: list[TokenGrid] = []

    class Look(SoftmaxAttention):
        def forward(self, *given: Any) -> Tensor:
            shapes.extend(tuple(x.shape) for x in given[:3])
            grids.append(given[3])
            return super().forward(*given)

    attention_sites.install(wan, sites_of(wan), lambda site: Look())
    wan(*inputs)
    assert set(shapes) == {(2, 12, 1, 128)}
    assert set(grids) == {TokenGrid((2, 3, 2))}


def test_trainable_weights_are_the_blocks_own(wan: WanModel) -> None:
    family, sites = identify(attention_sites.shapes_of(wan))
    before = attention_sites.trainable_weights(wan, family, sites)
    assert set(before) == {n for n, _ in wan.named_parameters() if n.startswith("blocks.")}
    attention_sites.install(wan, sites, lambda site: nn.Linear(2, 2))
    assert set(attention_sites.trainable_weights(wan, family, sites)) == set(before)


def test_recomputed_activations_give_equal_values_and_gradients(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    other = copy.deepcopy(wan)
    assert attention_sites.blocks(wan, sites_of(wan)) == list(wan.blocks)
    attention_sites.checkpoint_activations(other, sites_of(other))
    calls: list[int] = []
    other.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (wan, other):
        out = model(*inputs)
        out.square().sum().backward()
        outputs.append(out.detach())
    assert len(calls) == 2
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for (name, left), right in zip(wan.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=0, msg=name)
