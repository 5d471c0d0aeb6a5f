"""Softmax within tiles beside linear attention as one Triton kernel, forward.

One program has some queries of one tile and one head. It goes through the tile's keys and values
where they lie, as FlashAttention does, then takes the same queries' features times the state, which
`triton_launch.reduce_keys` made, and mixes both: scores, features and tiles are never in memory.
`hybrid_reference` derives the formulas; of its forms this is mass "query" and nothing besides.

Which token lies in which slot of a tile is `tiles.Tiles.token_at`, in the kernel's own arithmetic.
Kernel locals: i_ program index, o_ offsets, p_ pointer, m_ mask.
"""

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tiles
from .triton_kernels import LOG2_E, dot, load_matrix, product, to_weights
from .triton_launch import Launch, call, product_precision, reduce_keys

# Keys of a block, at most, and the narrowest tile of the tensor cores.
_MAX_KEYS, _MIN_TOKENS = 64, 16


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    weights: Mapping[str, Tensor],
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D], log A [B, N, L] fp32, and the state's means and normaliser.

    query, key, value: [B, L, N, D], last axis contiguous, L the tokens of `tiles`.
    query_map, key_map: [N, D, M/2]. weights: mass_bias [N] and mass_gate [N, D].
    """
    query_map, key_map = (x.to(value.dtype).contiguous() for x in (query_map, key_map))
    means, normaliser = reduce_keys(key_map, key, value)
    # Where no key lies outside, all is the tile's.
    level = 3 + math.log(tiles.num_slots) if tiles.num_tiles > 1 else -math.inf
    level = (level - 4 * weights["mass_bias"].float()).contiguous()
    gate = weights["mass_gate"].float().contiguous()
    states = (means, normaliser, level, gate)
    out, log_sums = call("hybrid", _run_hybrid, query_map, query, key, value, *states, tiles)
    return out, log_sums, means, normaliser


def _run_hybrid(
    launch: Launch,
    query_map: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    normaliser: Tensor,
    level: Tensor,
    gate: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    B, L, N, D = query.shape
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    log_sums = torch.empty(B, N, L, dtype=torch.float32, device=value.device)
    widest = max(_MIN_TOKENS, triton.next_power_of_2(tiles.num_slots))
    num_queries, num_keys = (min(most, widest) for most in (launch.tokens, _MAX_KEYS))
    num_keys = min(num_queries, num_keys)
    blocks = triton.cdiv(tiles.num_slots, num_queries)
    _, rows, columns = tiles.counts
    hybrid_kernel[tiles.num_tiles * blocks, B * N](
        query, key, value, query_map, means, normaliser, level, gate, out, log_sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        L, N, *tiles.grid, rows, columns, math.prod(tiles.counts), *tiles.shift,
        tiles.before, tiles.before + tiles.after,
        *tiles.tile, D, query_map.shape[2], num_queries, num_keys, product_precision(query_map),
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, log_sums


@triton.jit
def _find_tokens(
    o_slot, i_tile, frames, height, width, rows, columns, video_tiles,
    shift_f, shift_h, shift_w, before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Return the tokens in some slots of a tile, and whether there is one."""
    f = i_tile // (rows * columns) * TILE_F - shift_f + o_slot // (TILE_H * TILE_W)
    h = i_tile // columns % rows * TILE_H - shift_h + o_slot // TILE_W % TILE_H
    w = i_tile % columns * TILE_W - shift_w + o_slot % TILE_W
    m_video = (f >= 0) & (f < frames) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    video = (f * height + h) * width + w + before
    other = (i_tile - video_tiles) * (TILE_F * TILE_H * TILE_W) + o_slot
    m_other = other < num_others
    other = tl.where(other < before, other, other + frames * height * width)
    is_video = i_tile < video_tiles
    m_slot = o_slot < TILE_F * TILE_H * TILE_W
    tokens = tl.where(is_video, video, other)
    return tokens.to(tl.int64), m_slot & tl.where(is_video, m_video, m_other)


@triton.jit
def hybrid_kernel(
    p_query, p_key, p_value, p_map, p_means, p_normaliser, p_level, p_gate, p_out, p_log_sums,
    query_b, query_l, query_n, key_b, key_l, key_n, value_b, value_l, value_n, out_b, out_l, out_n,
    length, num_heads, frames, height, width, rows, columns, video_tiles,
    shift_f, shift_h, shift_w, before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output and log A of up to QUERIES slots of one tile.

    level: [N], `3 - 4 b + log T`; gate: [N, D], g; log_sums: [B N, L]. Of the linear part see
    `triton_kernels.map_kernel`.
    """
    T: tl.constexpr = TILE_F * TILE_H * TILE_W
    BLOCKS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    i_tile = i_block // BLOCKS
    i_b, i_n = (i_head // num_heads).to(tl.int64), i_head % num_heads
    o_d = tl.arange(0, D)
    o_query, m_query = _find_tokens(
        i_block % BLOCKS * QUERIES + tl.arange(0, QUERIES), i_tile,
        frames, height, width, rows, columns, video_tiles,
        shift_f, shift_h, shift_w, before, num_others, TILE_F, TILE_H, TILE_W,
    )  # fmt: skip
    # Of a tile that is cut off, many slots are empty.
    if tl.max(m_query.to(tl.int32), 0) == 0:
        return
    p_query += i_b * query_b + i_n * query_n + o_query[:, None] * query_l + o_d[None, :]
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    query = tl.load(p_query, mask=m_query[:, None], other=0.0).to(feature_map.dtype)
    p_key += i_b * key_b + i_n * key_n
    p_value += i_b * value_b + i_n * value_n
    # A finite start: the first keys may all be empty slots.
    highest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    local = tl.zeros((QUERIES, D), tl.float32)
    for start in range(0, T, KEYS):
        o_key, m_key = _find_tokens(
            start + tl.arange(0, KEYS), i_tile,
            frames, height, width, rows, columns, video_tiles,
            shift_f, shift_h, shift_w, before, num_others, TILE_F, TILE_H, TILE_W,
        )  # fmt: skip
        p_tile = p_key + o_key[:, None] * key_l + o_d[None, :]
        key = tl.load(p_tile, mask=m_key[:, None], other=0.0).to(feature_map.dtype)
        p_tile = p_value + o_key[:, None] * value_l + o_d[None, :]
        value = tl.load(p_tile, mask=m_key[:, None], other=0.0)
        scores = product(query, tl.trans(key), PRECISION) * (LOG2_E / D**0.5)
        scores = tl.where(m_key[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - now)
        weights = tl.exp2(scores - now[:, None])
        total = total * shrink + tl.sum(weights, 1)
        local = dot(weights.to(value.dtype), value, local * shrink[:, None], PRECISION)
        highest = now
    log_sum = (highest + tl.log2(total)) / LOG2_E
    local = local / total[:, None]
    p_normaliser += i_head * 2 * H + tl.arange(0, H)
    n_plus, n_minus = tl.load(p_normaliser), tl.load(p_normaliser + H)
    plus, minus = to_weights(product(query, feature_map, PRECISION), n_plus, n_minus)
    p_means += i_head.to(tl.int64) * 2 * H * D
    means = load_matrix(p_means, H, D)
    far = product(plus.to(means.dtype), means, PRECISION)
    means = load_matrix(p_means + H * D, H, D)
    far = dot(minus.to(means.dtype), means, far, PRECISION)
    gate = tl.load(p_gate + i_n * D + o_d)
    log_far = tl.load(p_level + i_n) - tl.sum(query.to(tl.float32) * gate[None, :], 1)
    share = tl.sigmoid(log_sum - log_far)
    out = far + share[:, None] * (local - far)
    p_out += i_b * out_b + i_n * out_n + o_query[:, None] * out_l + o_d[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_query[:, None])
    tl.store(p_log_sums + i_head.to(tl.int64) * length + o_query, log_sum, mask=m_query)
