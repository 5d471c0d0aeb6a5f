"""PISA and SLA against their definitions, block by block in fp64, and in a model's layers."""

import pytest
import torch
from torch import Tensor

from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import attention_at, shapes_of
from linvideo_core.models.families import identify
from research.hybrid_student import Case, untrained
from research.sparse_baselines import (
    BLOCK,
    PiecewiseAttention,
    SparseLinearAttention,
    piecewise_attention,
)
from tests.conftest import make_wan

# Ten blocks, the last one of 6 tokens.
L, N, D = 150, 2, 8
BLOCKS = [slice(start, min(start + BLOCK, L)) for start in range(0, L, BLOCK)]
ORDERS = (0, "mean", 1)
"""Of the expansion: pooled terms, PISA's with one mean matrix, each block's own."""


def make_tokens(num_tokens: int = L) -> list[Tensor]:
    """Return query, key and value [2, L, N, D] in fp64."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, num_tokens, N, D, generator=generator, dtype=torch.float64) for _ in range(3)
    ]


def make_layer(density: float, *, has_projection: bool = True) -> SparseLinearAttention:
    """Return an SLA layer in fp64 whose projection has left 0, or has not."""
    torch.manual_seed(1)
    layer = SparseLinearAttention(LinearAttention(N, D, 2 * D), density).double()
    if has_projection:
        layer.projection.data += torch.randn_like(layer.projection)
    return layer


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (torch.einsum("blnd,bsnd->bnls", query, key) / D**0.5).softmax(dim=-1)
    return torch.einsum("bnls,bsnd->blnd", weights, value)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of a whole tensor."""
    return ((found - expected).norm() / expected.norm()).item()


def expand(q: Tensor, k: Tensor, v: Tensor, num_exact: int, order: int | str) -> Tensor:
    """Return PISA's output [L, D] of one head from each block's matrix; see `ORDERS`."""
    pairs = [(k[b] - k[b].mean(dim=0)).T @ v[b] for b in BLOCKS]
    mean = sum(pairs) / len(pairs)
    bias = torch.stack([(pair - mean).norm() for pair in pairs]).log()
    centres = torch.stack([k[b].mean(dim=0) for b in BLOCKS])
    out = torch.empty_like(q)
    for rows in BLOCKS:
        best = (q[rows].mean(dim=0) @ centres.T / D**0.5 + bias).topk(num_exact).indices.tolist()
        for i in range(rows.start, rows.stop):
            numerator, denominator = torch.zeros_like(q[0]), 0.0
            for b, (keys, pair) in enumerate(zip(BLOCKS, pairs, strict=True)):
                if b in best:
                    weights = (q[i] @ k[keys].T / D**0.5).exp()
                    numerator, denominator = (
                        numerator + weights @ v[keys],
                        denominator + weights.sum(),
                    )
                    continue
                weight, count = (q[i] @ centres[b] / D**0.5).exp(), keys.stop - keys.start
                first = {0: 0.0, "mean": count / L * (q[i] @ sum(pairs)), 1: q[i] @ pair}[order]
                numerator = numerator + weight * (v[keys].sum(dim=0) + first / D**0.5)
                denominator = denominator + weight * count
            out[i] = numerator / denominator
    return out


@pytest.mark.parametrize("num_tokens", [1, 15, 64, L])
def test_where_all_blocks_are_exact_both_are_softmax(num_tokens: int) -> None:
    tokens = make_tokens(num_tokens)
    for layer in (PiecewiseAttention(1.0), make_layer(1.0), make_layer(1.0, has_projection=False)):
        torch.testing.assert_close(layer(*tokens), softmax(*tokens))


@pytest.mark.parametrize("is_blockwise", [False, True])
def test_pisa_is_the_expansion_of_each_block_that_is_not_chosen(*, is_blockwise: bool) -> None:
    tokens = make_tokens()
    found = piecewise_attention(*tokens, 0.2, is_blockwise=is_blockwise)
    for b, n in ((0, 0), (1, 1)):
        expected = expand(*(x[b, :, n] for x in tokens), 2, 1 if is_blockwise else "mean")
        torch.testing.assert_close(found[b, :, n], expected)
    rounded = [x.bfloat16() for x in tokens]
    narrow = piecewise_attention(*rounded, 0.2, is_blockwise=is_blockwise)
    wide = piecewise_attention(*(x.double() for x in rounded), 0.2, is_blockwise=is_blockwise)
    assert narrow.dtype == torch.bfloat16
    assert error(narrow.double(), wide) < 3e-3


def test_the_first_order_is_closer_than_pooled_terms_where_keys_vary_little() -> None:
    query, key, value = make_tokens()
    centres = torch.cat(
        [key[:, b].mean(dim=1, keepdim=True).expand_as(key[:, b]) for b in BLOCKS], 1
    )
    errors = {}
    for spread in (0.2, 0.1):
        near = 4 * centres + spread * (key - centres)
        # Values that follow the keys have much the same covariance with them in all blocks.
        for name, v in (("any", value), ("following", near + near.roll(1, dims=-1))):
            expected = softmax(query, near, v)
            for order in (0, 1):
                head = [x[0, :, 0] for x in (query, near, v)]
                errors[spread, name, order] = error(expand(*head, 1, order), expected[0, :, 0])
            found = piecewise_attention(query, near, v, 0.1)
            errors[spread, name, "mean"] = error(found[0, :, 0], expected[0, :, 0])
    assert errors[0.2, "any", 1] < 0.2 * errors[0.2, "any", 0]
    assert errors[0.1, "any", 1] < 0.3 * errors[0.2, "any", 1]
    assert errors[0.2, "following", "mean"] < 0.5 * errors[0.2, "following", 0]


def test_sla_is_softmax_of_critical_blocks_and_a_projection_of_linear_attention() -> None:
    tokens = make_tokens()
    layer = make_layer(0.2)
    found = layer(*tokens)
    q, k, v = (x[1, :, 1] for x in tokens)
    projected = q @ layer.query_map[1], k @ layer.key_map[1]
    features = [torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1) for x in projected]
    centres = torch.stack([k[b].mean(dim=0) for b in BLOCKS])
    for rows in BLOCKS:
        order = (q[rows].mean(dim=0) @ centres.T).argsort(descending=True).tolist()
        critical, marginal = (
            torch.cat([torch.arange(L)[BLOCKS[b]] for b in part])
            for part in (order[:2], order[2:9])
        )
        sparse = (q[rows] @ k[critical].T / D**0.5).softmax(dim=-1) @ v[critical]
        similarity = features[0][rows] @ features[1][marginal].T
        linear = similarity @ v[marginal] / similarity.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found[1, rows, 1], sparse + linear @ layer.projection[1])


def test_the_gradient_reaches_slas_maps_and_projection() -> None:
    tokens = [x.requires_grad_() for x in make_tokens()]
    start = make_layer(0.2, has_projection=False)
    for layer, still in ((start, ("query_map", "key_map")), (make_layer(0.2), ())):
        names, weights = zip(*layer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(layer(*tokens).square().sum(), [*weights, *tokens])
        sizes = dict(
            zip(names, (g.abs().amax(dim=(1, 2)).min().item() for g in gradients), strict=False)
        )
        assert {name for name, size in sizes.items() if size == 0} == {*still}
        assert all(g.isfinite().all() for g in gradients)


def test_what_needs_no_training_stands_in_the_layers_of_its_case_alone() -> None:
    model = make_wan(num_layers=10)
    _, sites = identify(shapes_of(model))
    before = [attention_at(model, site) for site in sites]
    with untrained(model, Case(form="pisa", density=0.2, layers=5)):
        within = [attention_at(model, site) for site in sites]
    changed = [layer for layer, module in enumerate(within) if module is not before[layer]]
    assert changed == [0, 1, 3, 4, 9]
    assert {type(within[layer]) for layer in changed} == {PiecewiseAttention}
    assert [attention_at(model, site) for site in sites] == before
