"""Softmax, linear and mixed attention take each other's place."""

import math

import pytest
import torch
from torch import Tensor

from linvideo_core.kernels.softmax import SOFTMAX_KERNELS, softmax_attention
from linvideo_core.models.attention import LinearAttention, MixedAttention, SoftmaxAttention

Triple = tuple[Tensor, Tensor, Tensor]


def make_triple(query_length: int = 63, key_length: int = 63) -> Triple:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, length, 3, 16, generator=generator)
        for length in (query_length, key_length, key_length)
    )
    return query, key, value


def make_mixed(layer_score: float) -> MixedAttention:
    linear = LinearAttention(3, 16, 16)
    linear.init_weights(torch.Generator().manual_seed(1))
    return MixedAttention(linear, layer_score)


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (63, 63), (63, 5), (1, 1000)])
def test_softmax_attention_is_its_definition(query_length: int, key_length: int) -> None:
    query, key, value = make_triple(query_length, key_length)
    logits = torch.einsum("blnd,bsnd->bnls", query, key) / math.sqrt(16)
    expected = torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), value)
    torch.testing.assert_close(SoftmaxAttention()(query, key, value), expected)


def test_softmax_by_a_kernel_of_that_name_or_a_sentence() -> None:
    query, key, value = make_triple(63, 5)
    by_default = softmax_attention(query, key, value)
    torch.testing.assert_close(softmax_attention(query, key, value, "flash"), by_default)
    with pytest.raises(ValueError, match=r"cudnn attention cannot compute float32 .* dim 16"):
        softmax_attention(query, key, value, "cudnn")
    with pytest.raises(RuntimeError, match="dtype"):
        softmax_attention(query, key.double(), value, "flash")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in SOFTMAX_KERNELS if name != "sparse"])
def test_every_kernel_of_softmax_is_the_definition_on_a_gpu(kernel: str) -> None:
    triple = [torch.randn(2, 500, 3, 128, device="cuda").bfloat16() for _ in range(3)]
    expected = softmax_attention(*(x.double() for x in triple))
    found = softmax_attention(*triple, kernel)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("layer_score", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_mixture_lies_between_its_branches_and_r_learns_along_their_difference(
    layer_score: float,
) -> None:
    triple = make_triple()
    mixed = make_mixed(layer_score)
    upstream = torch.randn(2, 63, 3, 16, generator=torch.Generator().manual_seed(2))
    found = mixed(*triple)
    found.backward(upstream)
    with torch.no_grad():
        softmax, linear = mixed.softmax(*triple), mixed.linear(*triple)
    torch.testing.assert_close(found, layer_score * softmax + (1 - layer_score) * linear)
    if layer_score in (0, 1):
        assert torch.equal(found, softmax if layer_score else linear)
    expected = (upstream * (softmax - linear)).sum()
    torch.testing.assert_close(mixed.layer_score.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["linear", "softmax"])
def test_a_hardened_layer_computes_its_branch_alone_and_gives_r_no_gradient(choice: str) -> None:
    triple = [x.requires_grad_() for x in make_triple()]
    mixed = make_mixed(0.4)
    expected = mixed.get_submodule(choice)(*triple)
    calls: list[str] = []
    for name, child in mixed.named_children():
        child.register_forward_hook(lambda *_, name=name: calls.append(name))
    mixed(*triple)
    assert sorted(calls) == ["linear", "softmax"]
    calls.clear()
    mixed.mode = choice
    found = mixed(*triple)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert calls == [choice] and mixed.layer_score.grad is None


def test_a_disabled_layer_is_softmax_in_any_mode() -> None:
    triple, mixed = make_triple(), make_mixed(0.4)
    mixed.enabled = False
    for mode in ("mixed", "linear", "softmax"):
        mixed.mode = mode
        assert torch.equal(mixed(*triple), mixed.softmax(*triple))


@pytest.mark.parametrize("feature_dim", [-2, 0, 1, 15])
def test_an_odd_or_missing_feature_dim_is_refused(feature_dim: int) -> None:
    with pytest.raises(ValueError, match=f"feature_dim {feature_dim} given"):
        LinearAttention(3, 16, feature_dim)


@pytest.mark.parametrize("feature_dim", [2, 16, 32, 48])
def test_maps_start_orthogonal_alike_on_both_sides_and_decided_by_the_generator(
    feature_dim: int,
) -> None:
    linear = LinearAttention(3, 16, feature_dim)
    linear.init_weights(torch.Generator().manual_seed(3))
    again = LinearAttention(3, 16, feature_dim)
    again.init_weights(torch.Generator().manual_seed(3))
    assert linear.feature_dim == feature_dim
    assert torch.equal(linear.query_map, linear.key_map)
    assert torch.equal(linear.query_map, again.query_map)
    assert not torch.equal(linear.query_map[0], linear.query_map[1])
    for head_map in linear.query_map.detach():
        scaled = head_map * 16**0.25 / (feature_dim / 2) ** 0.5
        product = scaled.T @ scaled if scaled.shape[0] >= scaled.shape[1] else scaled @ scaled.T
        torch.testing.assert_close(product, torch.eye(len(product)), rtol=0, atol=1e-5)
