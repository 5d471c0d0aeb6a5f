"""Triton kernels of qk-norm and rotary embedding: each tensor is read once and written once.

One program has one token: all its heads share a norm, and all have the same angles. The second
look at a token's row finds it in the cache.

Kernel locals: i_ program index, o_ offsets, p_ pointer, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_TILE = 2048


@triton.jit
def _load_heads(p_x, start, num_heads, stride, HEADS: tl.constexpr, D: tl.constexpr):
    o_n = start + tl.arange(0, HEADS)
    p_tile = p_x + o_n[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(p_tile, mask=(o_n < num_heads)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_heads(p_x, tile, start, num_heads, HEADS: tl.constexpr, D: tl.constexpr):
    o_n = start + tl.arange(0, HEADS)
    p_tile = p_x + o_n[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_tile, tile.to(p_x.dtype.element_ty), mask=(o_n < num_heads)[:, None])


@triton.jit
def _turn(tile, cos, sin, HEADS: tl.constexpr, D: tl.constexpr):
    """Rotate neighbouring channels of a tile [HEADS, D] by cos and sin [D/2]."""
    even, odd = tl.split(tl.reshape(tile, (HEADS, D // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, D))


@triton.jit
def _forward(
    p_x, p_weight, p_rotary, p_out, x_b, x_l, rotary_s, rotary_l, rotary_d,
    length, num_heads, eps,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    i_l, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_x += i_b * x_b + i_l * x_l
    p_out += (i_b * length + i_l) * num_heads * D
    squares = tl.zeros((HEADS, D), tl.float32)
    for start in range(0, num_heads, HEADS):
        x = _load_heads(p_x, start, num_heads, D, HEADS, D)
        squares += x * x
    scale = 1 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / (num_heads * D) + eps)
    p_rotary += i_l * rotary_l + tl.arange(0, D // 2) * rotary_d
    cos, sin = tl.load(p_rotary), tl.load(p_rotary + rotary_s)
    for start in range(0, num_heads, HEADS):
        x = _load_heads(p_x, start, num_heads, D, HEADS, D)
        weight = _load_heads(p_weight, start, num_heads, D, HEADS, D)
        turned = _turn(x * scale * weight, cos, sin, HEADS, D)
        _store_heads(p_out, turned, start, num_heads, HEADS, D)


@triton.jit
def _backward(
    p_do, p_x, p_weight, p_rotary, p_dx, do_b, do_l, do_n, x_b, x_l,
    rotary_s, rotary_l, rotary_d, length, num_heads, eps,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """With r = 1/rms and h = w R^T do: dx = r h - r^3 x mean(h x)."""
    i_l, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_x += i_b * x_b + i_l * x_l
    p_do += i_b * do_b + i_l * do_l
    p_dx += (i_b * length + i_l) * num_heads * D
    p_rotary += i_l * rotary_l + tl.arange(0, D // 2) * rotary_d
    cos, sin = tl.load(p_rotary), -tl.load(p_rotary + rotary_s)
    squares = tl.zeros((HEADS, D), tl.float32)
    products = tl.zeros((HEADS, D), tl.float32)
    for start in range(0, num_heads, HEADS):
        x = _load_heads(p_x, start, num_heads, D, HEADS, D)
        weight = _load_heads(p_weight, start, num_heads, D, HEADS, D)
        upstream = _load_heads(p_do, start, num_heads, do_n, HEADS, D)
        squares += x * x
        products += weight * _turn(upstream, cos, sin, HEADS, D) * x
    width = num_heads * D
    scale = 1 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / width + eps)
    along = scale * scale * tl.sum(tl.sum(products, 1), 0) / width
    for start in range(0, num_heads, HEADS):
        x = _load_heads(p_x, start, num_heads, D, HEADS, D)
        weight = _load_heads(p_weight, start, num_heads, D, HEADS, D)
        upstream = _load_heads(p_do, start, num_heads, do_n, HEADS, D)
        dx = scale * (weight * _turn(upstream, cos, sin, HEADS, D) - along * x)
        _store_heads(p_dx, dx, start, num_heads, HEADS, D)


def forward(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    """Return [B, L, N, D] of x [B, L, N D], its last axis contiguous."""
    B, L, width = x.shape
    D = width // num_heads
    out = torch.empty(B, L, num_heads, D, dtype=x.dtype, device=x.device)
    _forward[L, B](
        x, weight.contiguous(), rotary, out, *x.stride()[:2], *rotary.stride(), L, num_heads, eps,
        _heads_of_tile(num_heads, D), D, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def backward(upstream: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    """Return the gradient of x from that of the output, upstream [B, L, N, D]."""
    B, L, N, D = upstream.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _backward[L, B](
        upstream, x, weight.contiguous(), rotary, dx,
        *upstream.stride()[:3], *x.stride()[:2], *rotary.stride(), L, N, eps,
        _heads_of_tile(N, D), D, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dx


def _heads_of_tile(num_heads: int, D: int) -> int:
    return min(triton.next_power_of_2(num_heads), max(1, _MAX_TILE // D))
