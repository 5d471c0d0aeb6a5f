"""Linear attention through its door, against the quadratic definition in fp64."""

import pytest
import torch
from torch import Tensor

from linvideo_core.kernels import linear_attention

LENGTH_PAIRS = ((1, 1), (63, 1000), (1000, 1), (1, 63))
# Relative error of the whole tensor against fp64, by the inputs' dtype.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    query_length: int,
    key_length: int,
    *,
    num_heads: int = 3,
    head_dim: int = 16,
    ratio: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Return query, key, value and both maps for M = ratio * head_dim, batch 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    half = ratio * head_dim // 2
    return (
        normal(2, query_length, num_heads, head_dim),
        normal(2, key_length, num_heads, head_dim),
        normal(2, key_length, num_heads, head_dim),
        normal(num_heads, head_dim, half),
        normal(num_heads, head_dim, half),
    )


def features(x: Tensor, feature_map: Tensor) -> Tensor:
    """Return softmax(x W) ++ softmax(-x W), LinVideo eq. 4, head by head."""
    heads = [x[:, :, n] @ feature_map[n] for n in range(x.shape[2])]
    projected = torch.stack(heads, dim=2)
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


def weights(query: Tensor, key: Tensor, query_map: Tensor, key_map: Tensor) -> Tensor:
    """Return the attention matrix [B, N, L, S] of the quadratic definition."""
    query_features = features(query, query_map).transpose(1, 2)
    key_features = features(key, key_map).transpose(1, 2)
    similarity = query_features @ key_features.transpose(2, 3)
    return similarity / similarity.sum(dim=3, keepdim=True)


def definition(query: Tensor, key: Tensor, value: Tensor, *maps: Tensor) -> Tensor:
    """Return linear attention as its O(L^2) definition has it (LinVideo eq. 3)."""
    return (weights(query, key, *maps) @ value.transpose(1, 2)).transpose(1, 2)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def in_fp64(inputs: Inputs) -> list[Tensor]:
    return [x.detach().double().requires_grad_(True) for x in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(("query_length", "key_length"), LENGTH_PAIRS)
def test_linear_attention_is_its_definition_in_value_and_gradient(
    query_length: int, key_length: int, ratio: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(query_length, key_length, ratio=ratio, dtype=dtype)
    exact_inputs = in_fp64(inputs)
    expected = definition(*exact_inputs)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected.backward(upstream.double())

    for x in inputs:
        x.requires_grad_(True)
    found = linear_attention(*inputs)
    found.backward(upstream)

    assert found.dtype == dtype
    assert error(found.detach(), expected.detach()) < TOLERANCE[dtype]
    names = ("query", "key", "value", "query_map", "key_map")
    # With one key the output is its value: all other gradients are zero and have no scale.
    scale = max(float(x.grad.norm()) for x in exact_inputs) if key_length == 1 else 0.0
    for name, x, exact in zip(names, inputs, exact_inputs, strict=True):
        difference = float((x.grad.double() - exact.grad).norm())
        assert difference <= TOLERANCE[dtype] * max(float(exact.grad.norm()), scale), name


def test_bf16_inputs_accumulate_in_fp32() -> None:
    inputs = make_inputs(63, 1000, dtype=torch.bfloat16)
    in_fp32 = linear_attention(*(x.float() for x in inputs))
    found = linear_attention(*inputs)
    # One rounding at the end, half a unit in the last of bf16's eight places, and nothing else.
    torch.testing.assert_close(found.float(), in_fp32, rtol=2**-8, atol=1e-6)


def test_autocast_does_not_lower_the_accumulation() -> None:
    inputs = make_inputs(63, 63)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_attention(*inputs)
    torch.testing.assert_close(found, linear_attention(*inputs), rtol=0, atol=0)


def test_the_order_and_number_of_the_keys_do_not_matter() -> None:
    query, key, value, *maps = make_inputs(5, 63)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    keys, values = (x[:, order].repeat(1, 3, 1, 1) for x in (key, value))
    found = linear_attention(query, keys, values, *maps)
    torch.testing.assert_close(found, linear_attention(query, key, value, *maps))


def test_weights_are_positive_and_the_output_stays_within_the_values() -> None:
    query, key, value, *maps = make_inputs(63, 17)
    # With one-hot values the output is the attention matrix itself.
    one_hot = torch.eye(17)[:, None].expand(2, 17, 3, 17)
    padded = [torch.nn.functional.pad(x, (0, 1)) for x in (query, key)]
    wide_maps = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in maps]
    matrix = linear_attention(*padded, one_hot, *wide_maps)
    assert bool((matrix > 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 63, 3))
    found = linear_attention(query, key, value, *maps)
    low, high = value.amin(dim=1, keepdim=True), value.amax(dim=1, keepdim=True)
    assert bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all())


def test_large_inputs_stay_finite_in_value_and_gradient() -> None:
    inputs = [x * 1e3 for x in make_inputs(63, 63)]
    for x in inputs:
        x.requires_grad_(True)
    found = linear_attention(*inputs)
    found.sum().backward()
    assert bool(torch.isfinite(found).all())
    assert all(bool(torch.isfinite(x.grad).all()) for x in inputs)


def _replace(index: int, *shape: int) -> list[Tensor]:
    inputs = list(make_inputs(5, 7))
    inputs[index] = torch.zeros(shape)
    return inputs


@pytest.mark.parametrize(
    ("index", "shape", "words"),
    [
        (0, (2, 5, 48), "query has shape"),
        (0, (2, 5, 3, 8), "key has shape"),
        (1, (1, 7, 3, 16), "key has shape"),
        (1, (2, 7, 2, 16), "key has shape"),
        (1, (7, 3, 16), "key has shape"),
        (1, (2, 6, 3, 16), "key has 6 tokens and value 7"),
        (2, (2, 7, 3, 8), "value has shape"),
        (3, (2, 16, 8), "query_map has shape"),
        (3, (3, 8, 8), "query_map has shape"),
        (4, (16, 8), "key_map has shape"),
        (4, (3, 16, 4), "key_map has shape"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(index: int, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        linear_attention(*_replace(index, *shape))
    assert "\n" not in str(caught.value)


def test_tensors_on_several_devices_and_unknown_feature_maps_are_refused() -> None:
    inputs = list(make_inputs(5, 7))
    with pytest.raises(ValueError, match="feature_map 'relu' given; one of hedgehog, hedgehog_jo"):
        linear_attention(*inputs, feature_map="relu")
    inputs[3] = inputs[3].to("meta")
    with pytest.raises(ValueError, match="several devices") as caught:
        linear_attention(*inputs)
    assert "\n" not in str(caught.value)
