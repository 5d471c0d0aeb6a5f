r"""Softmax within tiles beside linear attention as Triton kernels, forward and backward.

One program has some queries of one tile and one head. It goes through the tile's keys and values
where they lie, as FlashAttention does, then takes the same queries' features times the state, which
`triton_launch.reduce_keys` made, and mixes both: scores, features and tiles are never in memory.
`hybrid_reference` derives the formulas. Both of its attention masses come here as

    log F_i = level + slope . q_i        and, of "moments", + q_i' spread q_i + log n_i

Backward sees one softmax: a key of the tile weighs w_ij = exp(q_i k_j / sqrt(D)) / (A_i + F_i), and
linear attention has the share f_i = F_i / (A_i + F_i), so that with o_i the whole output

    dv_j = sum_i w_ij do_i    dscore_ij = w_ij do_i (v_j - o_i)    dlog F_i = f_i do_i (far_i - o_i)

and linear attention has the gradient f_i do_i, which `triton_launch.pull_back` takes on.
A tile's keys go through its queries, its queries through its keys, each adding to what that wrote.

Which token lies in which slot of a tile is `tiles.Tiles.token_at`, in the kernel's own arithmetic.
Kernel locals: i_ program index, o_ offsets, p_ pointer, m_ mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tiles
from .triton_kernels import LOG2_E, dot, load_matrix, product, store_matrix, to_weights
from .triton_launch import (
    FEATURE_DTYPES,
    Launch,
    call,
    product_precision,
    pull_back,
    reduce_keys,
    split_tokens,
)

# Tokens that a program goes through at a time, at most, and the narrowest tile of tensor cores.
_MAX_OTHERS, _MIN_TOKENS = 64, 16


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    level: Tensor,
    slope: Tensor,
    spread: Tensor | None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D], mass [2, B, N, L] fp32, and the state's means and normaliser.

    query, key, value: [B, L, N, D], last axis contiguous, L the tokens of `tiles`.
    query_map, key_map: [N, D, M/2]; level: [N] fp32; slope: [B, N, D] fp32; spread: [B, N, D, D]
        fp32, symmetric, or none.
    mass: log(A + F) of each query, and f.
    """
    query_map, key_map = (x.to(value.dtype).contiguous() for x in (query_map, key_map))
    means, normaliser = reduce_keys(key_map, key, value)
    estimate = _prepare(level, slope, spread, value)
    states = (means, normaliser, estimate)
    out, mass = call("hybrid", _run_hybrid, query_map, query, key, value, *states, tiles)
    return out, mass, means, normaliser


def backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    level: Tensor,
    slope: Tensor,
    spread: Tensor | None,
    out: Tensor,
    mass: Tensor,
    means: Tensor,
    normaliser: Tensor,
    tiles: Tiles,
    *,
    needs_map_gradients: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, both maps, level, slope and, if any, spread.

    upstream: [B, L, N, D], the output's gradient, last axis contiguous; out, mass, means and
    normaliser as `forward` gave them. In the inputs' dtypes; the maps' are 0 if unwanted.
    """
    arguments = (upstream, query, key, value, query_map, key_map, means, normaliser)
    settings = {"needs_map_gradients": needs_map_gradients}
    gradients, rows = pull_back(*arguments, (out, mass[1]), **settings)
    # A launch depends on a map's shape and on the dtype of products.
    like_map = query_map.to("meta", value.dtype)
    estimate = _prepare(level, slope, spread, value)
    arguments = (query, key, value, upstream, rows, mass, estimate, gradients[:3], tiles)
    dlevel, dslope, dlog = call("hybrid backward", _run_backward, like_map, *arguments)
    gradients = (*gradients, dlevel.sum(dim=(0, 2)), dslope.sum(dim=2))
    if spread is None:
        return gradients
    return *gradients, call("moments", _run_moments, like_map, query, dlog)[1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over tokens of x [B, N, D] and of x x' [B, N, D, D], fp32.

    x: [B, L, N, D], last axis contiguous.
    """
    _, L, N, D = x.shape
    like_map = torch.empty(N, D, D // 2, dtype=x.dtype, device="meta")
    return tuple(total / L for total in call("moments", _run_moments, like_map, x))


def _prepare(
    level: Tensor, slope: Tensor, spread: Tensor | None, value: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    spread = None if spread is None else spread.to(value.dtype).contiguous()
    return level.contiguous(), slope.contiguous(), spread


def _run_hybrid(
    launch: Launch,
    query_map: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    normaliser: Tensor,
    estimate: tuple[Tensor, Tensor, Tensor | None],
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    B, L, N, D = query.shape
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    mass = torch.empty(2, B, N, L, dtype=torch.float32, device=value.device)
    num_programs, blocks = _block_sizes(launch, tiles)
    hybrid_kernel[num_programs, B * N](
        query, key, value, query_map, means, normaliser, *_pointers(estimate), out, mass,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        L, N, *_places(tiles), *blocks, D, query_map.shape[2], product_precision(query_map),
        estimate[2] is not None,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, mass


def _run_backward(
    launch: Launch,
    feature_map: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    rows: Tensor,
    mass: Tensor,
    estimate: tuple[Tensor, Tensor, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor],
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the gradients of query, key, value; return those of level, slope and log F.

    They are fp32, [B, N, programs], [B, N, programs, D], and [B, N, L], which no one writes where
    there is no spread.
    """
    B, L, N, D = query.shape
    num_programs, blocks = _block_sizes(launch, tiles)
    shapes = (B, N, num_programs), (B, N, num_programs, D), (B, N, L)
    found = [torch.empty(x, dtype=torch.float32, device=query.device) for x in shapes]
    _, features = FEATURE_DTYPES[value.dtype]
    strides = (x.stride()[:3] for x in (query, key, value, upstream))
    hybrid_backward_kernel[2 * num_programs, B * N](
        query, key, value, upstream, rows, mass, *_pointers(estimate)[1:], *gradients, *found,
        *(number for stride in strides for number in stride),
        L, N, *_places(tiles), *blocks, D, features, product_precision(feature_map),
        estimate[2] is not None,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return tuple(found)


def _pointers(estimate: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    level, slope, spread = estimate
    return level, slope, slope if spread is None else spread


def _run_moments(
    launch: Launch, feature_map: Tensor, x: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sums of w x [B, N, D] and w x x' [B, N, D, D]; weights: [B, N, L] fp32, or all 1."""
    B, L, N, D = x.shape
    splits, split_length = split_tokens(L, B * N, launch, x.device, state_bytes=4 * D * D)
    shapes = (B, N, splits, D), (B, N, splits, D, D)
    sums, products = (torch.empty(y, dtype=torch.float32, device=x.device) for y in shapes)
    moments_kernel[splits, B * N](
        x, sums if weights is None else weights, sums, products, *x.stride()[:3],
        L, split_length, N, D, launch.tokens, FEATURE_DTYPES[feature_map.dtype][1],
        product_precision(feature_map), weights is not None,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return sums.sum(dim=2), products.sum(dim=2)


def _block_sizes(launch: Launch, tiles: Tiles) -> tuple[int, tuple[int, ...]]:
    """Return programs a head, and what of `_find_tokens` is constant, with the blocks' sizes."""
    widest = max(_MIN_TOKENS, triton.next_power_of_2(tiles.num_slots))
    own = min(launch.tokens, widest)
    blocks = triton.cdiv(tiles.num_slots, own)
    return tiles.num_tiles * blocks, (*tiles.tile, own, min(own, _MAX_OTHERS))


def _places(tiles: Tiles) -> tuple[int, ...]:
    """Return what of `_find_tokens` is no constant."""
    _, rows, columns = tiles.counts
    places = (*tiles.grid, rows, columns, math.prod(tiles.counts))
    return *places, tiles.before, tiles.before + tiles.after


@triton.jit
def _find_tokens(
    o_slot, i_tile, frames, height, width, rows, columns, video_tiles, before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Return the tokens in some slots of a tile, and whether there is one."""
    f = i_tile // (rows * columns) * TILE_F + o_slot // (TILE_H * TILE_W)
    h = i_tile // columns % rows * TILE_H + o_slot // TILE_W % TILE_H
    w = i_tile % columns * TILE_W + o_slot % TILE_W
    m_video = (f < frames) & (h < height) & (w < width)
    video = (f * height + h) * width + w + before
    other = (i_tile - video_tiles) * (TILE_F * TILE_H * TILE_W) + o_slot
    m_other = other < num_others
    other = tl.where(other < before, other, other + frames * height * width)
    is_video = i_tile < video_tiles
    m_slot = o_slot < TILE_F * TILE_H * TILE_W
    tokens = tl.where(is_video, video, other)
    return tokens.to(tl.int64), m_slot & tl.where(is_video, m_video, m_other)


@triton.jit
def _load_tokens(p_x, stride, o_token, m_token, D: tl.constexpr):
    p_tile = p_x + o_token[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(p_tile, mask=m_token[:, None], other=0.0)


@triton.jit
def hybrid_kernel(
    p_query, p_key, p_value, p_map, p_means, p_normaliser, p_level, p_slope, p_spread,
    p_out, p_mass,
    query_b, query_l, query_n, key_b, key_l, key_n, value_b, value_l, value_n, out_b, out_l, out_n,
    length, num_heads, frames, height, width, rows, columns, video_tiles,
    before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PRECISION: tl.constexpr, HAS_SPREAD: tl.constexpr,
):  # fmt: skip
    """Write the output and mass of up to QUERIES slots of one tile.

    level: [N]; slope: [B N, D]; spread: [B N, D, D]; mass: [2, B N, L]. Of the linear part see
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
        before, num_others, TILE_F, TILE_H, TILE_W,
    )  # fmt: skip
    # Of a tile that is cut off, many slots are empty.
    if tl.max(m_query.to(tl.int32), 0) == 0:
        return
    p_query += i_b * query_b + i_n * query_n
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    query = _load_tokens(p_query, query_l, o_query, m_query, D).to(feature_map.dtype)
    p_key += i_b * key_b + i_n * key_n
    p_value += i_b * value_b + i_n * value_n
    # Finite from the first keys on: a tile's first slot is never empty.
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    local = tl.zeros((QUERIES, D), tl.float32)
    num_inside = tl.zeros((KEYS,), tl.int32)
    for start in range(0, T, KEYS):
        o_key, m_key = _find_tokens(
            start + tl.arange(0, KEYS), i_tile,
            frames, height, width, rows, columns, video_tiles,
            before, num_others, TILE_F, TILE_H, TILE_W,
        )  # fmt: skip
        key = _load_tokens(p_key, key_l, o_key, m_key, D).to(feature_map.dtype)
        value = _load_tokens(p_value, value_l, o_key, m_key, D)
        scores = product(query, tl.trans(key), PRECISION) * (LOG2_E / D**0.5)
        scores = tl.where(m_key[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - now)
        weights = tl.exp2(scores - now[:, None])
        total = total * shrink + tl.sum(weights, 1)
        local = dot(weights.to(value.dtype), value, local * shrink[:, None], PRECISION)
        highest = now
        num_inside += m_key.to(tl.int32)
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
    slope = tl.load(p_slope + i_head * D + o_d)[None, :]
    log_far = tl.load(p_level + i_n)
    if HAS_SPREAD:
        spread = load_matrix(p_spread + i_head.to(tl.int64) * D * D, D, D)
        slope += product(query, spread, PRECISION)
        log_far += tl.log2((length - tl.sum(num_inside, 0)).to(tl.float32)) / LOG2_E
    log_far += tl.sum(query.to(tl.float32) * slope, 1)
    # Of A in A + F; both in logarithms, as either alone may overflow.
    odds = log_sum - log_far
    share = tl.sigmoid(odds)
    out = far + share[:, None] * (local - far)
    p_out += i_b * out_b + i_n * out_n + o_query[:, None] * out_l + o_d[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_query[:, None])
    p_mass += i_head.to(tl.int64) * length + o_query
    log_total = tl.maximum(log_sum, log_far) + tl.log2(1 + tl.exp2(-tl.abs(odds) * LOG2_E)) / LOG2_E
    tl.store(p_mass, log_total, mask=m_query)
    p_mass += tl.num_programs(1).to(tl.int64) * length
    tl.store(p_mass, tl.sigmoid(-odds), mask=m_query)


@triton.jit
def _pull_back(
    p_x, p_y, x_l, y_l, p_other_x, p_other_y, other_x_l, other_y_l, p_rows, p_mass,
    i_block, i_tile, frames, height, width, rows, columns, video_tiles,
    before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, IS_KEY: tl.constexpr,
):  # fmt: skip
    """Return a block's tokens, whether there are any, their x, gradients of x and y, and two sums.

    x and y are q and do, those of the others k and v; of a block of keys the reverse. The first
    gradient lacks 1 / sqrt(D), and only values have a second. Sums over the keys are of queries
    alone: the weights, and the weights times do v_j.
    """
    o_own, m_own = _find_tokens(
        i_block * OWN + tl.arange(0, OWN), i_tile,
        frames, height, width, rows, columns, video_tiles,
        before, num_others, TILE_F, TILE_H, TILE_W,
    )  # fmt: skip
    narrow = p_other_y.dtype.element_ty
    x = _load_tokens(p_x, x_l, o_own, m_own, D).to(narrow)
    y = _load_tokens(p_y, y_l, o_own, m_own, D).to(FEATURES)
    if not IS_KEY:
        log_total = tl.load(p_mass + o_own, mask=m_own, other=float("inf")) * LOG2_E
        whole = tl.load(p_rows + o_own * 4 + 1, mask=m_own, other=0.0)
    dx = tl.zeros((OWN, D), tl.float32)
    dy = tl.zeros((OWN, D), tl.float32)
    inside = tl.zeros((OWN,), tl.float32)
    along = tl.zeros((OWN,), tl.float32)
    # Of a tile that is cut off, many slots are empty.
    last = TILE_F * TILE_H * TILE_W * tl.max(m_own.to(tl.int32), 0)
    for start in range(0, last, OTHERS):
        o_other, m_other = _find_tokens(
            start + tl.arange(0, OTHERS), i_tile,
            frames, height, width, rows, columns, video_tiles,
            before, num_others, TILE_F, TILE_H, TILE_W,
        )  # fmt: skip
        other_x = _load_tokens(p_other_x, other_x_l, o_other, m_other, D).to(narrow)
        other_y = _load_tokens(p_other_y, other_y_l, o_other, m_other, D).to(FEATURES)
        scores = product(x, tl.trans(other_x), PRECISION) * (LOG2_E / D**0.5)
        slopes = product(y, tl.trans(other_y), PRECISION)
        if IS_KEY:
            # Of an empty slot: exp2 of minus infinity, no weight.
            log_total = tl.load(p_mass + o_other, mask=m_other, other=float("inf")) * LOG2_E
            whole = tl.load(p_rows + o_other * 4 + 1, mask=m_other, other=0.0)
            weights = tl.exp2(scores - log_total[None, :])
            slopes = weights * (slopes - whole[None, :])
            dy = dot(weights.to(FEATURES), other_y, dy, PRECISION)
        else:
            scores = tl.where(m_other[None, :], scores, float("-inf"))
            weights = tl.exp2(scores - log_total[:, None])
            inside += tl.sum(weights, 1)
            along += tl.sum(weights * slopes, 1)
            slopes = weights * (slopes - whole[:, None])
        dx = dot(slopes.to(FEATURES), other_x.to(FEATURES), dx, PRECISION)
    return o_own, m_own, x, dx, dy, inside, along


@triton.jit
def _add_to(p_x, o_token, m_token, stride, tile, D: tl.constexpr):
    p_tile = p_x + o_token[:, None] * stride + tl.arange(0, D)[None, :]
    tile += tl.load(p_tile, mask=m_token[:, None], other=0.0).to(tl.float32)
    tl.store(p_tile, tile.to(p_x.dtype.element_ty), mask=m_token[:, None])


@triton.jit
def hybrid_backward_kernel(
    p_query, p_key, p_value, p_upstream, p_rows, p_mass, p_slope, p_spread,
    p_dquery, p_dkey, p_dvalue, p_dlevel, p_dslope, p_dlog,
    query_b, query_l, query_n, key_b, key_l, key_n, value_b, value_l, value_n,
    upstream_b, upstream_l, upstream_n,
    length, num_heads, frames, height, width, rows, columns, video_tiles,
    before, num_others,
    TILE_F: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, HAS_SPREAD: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of up to OWN slots of one tile, of queries or of keys and values.

    dquery, dkey, dvalue: [B, L, N, D], contiguous; of a program dlevel [B N, programs] and dslope
    [B N, programs, D], fp32; dlog: [B N, L] fp32. Neighbouring programs read the same tile.
    """
    BLOCKS: tl.constexpr = (TILE_F * TILE_H * TILE_W + OWN - 1) // OWN
    i_program, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_tile, i_block = i_program // (2 * BLOCKS), i_program % BLOCKS
    i_b, i_n = i_head // num_heads, i_head % num_heads
    p_query += i_b * query_b + i_n * query_n
    p_key += i_b * key_b + i_n * key_n
    p_value += i_b * value_b + i_n * value_n
    p_upstream += i_b * upstream_b + i_n * upstream_n
    p_rows += i_head * 4 * length
    p_mass += i_head * length
    out = (i_b * length * num_heads + i_n) * D
    if i_program // BLOCKS % 2 == 0:
        o_key, m_key, _key, dkey, dvalue, _inside, _along = _pull_back(
            p_key, p_value, key_l, value_l, p_query, p_upstream, query_l, upstream_l,
            p_rows, p_mass, i_block, i_tile, frames, height, width, rows, columns, video_tiles,
            before, num_others,
            TILE_F, TILE_H, TILE_W, OWN, OTHERS, D, FEATURES, PRECISION, True,
        )  # fmt: skip
        _add_to(p_dkey + out, o_key, m_key, num_heads * D, dkey * D**-0.5, D)
        _add_to(p_dvalue + out, o_key, m_key, num_heads * D, dvalue, D)
    else:
        o_query, m_query, query, dquery, _zeros, inside, along = _pull_back(
            p_query, p_upstream, query_l, upstream_l, p_key, p_value, key_l, value_l,
            p_rows, p_mass, i_block, i_tile, frames, height, width, rows, columns, video_tiles,
            before, num_others,
            TILE_F, TILE_H, TILE_W, OWN, OTHERS, D, FEATURES, PRECISION, False,
        )  # fmt: skip
        p_far = p_mass + tl.num_programs(1).to(tl.int64) * length
        far = tl.load(p_far + o_query, mask=m_query, other=0.0)
        # Not do (far - o), small between rounded numbers: 1 - f is the sum of the tile's weights.
        along_far = tl.load(p_rows + o_query * 4, mask=m_query, other=0.0)
        dlog = far * (inside * along_far - along)
        slope = tl.load(p_slope + i_head * D + tl.arange(0, D))[None, :]
        if HAS_SPREAD:
            spread = load_matrix(p_spread + i_head * D * D, D, D)
            slope += 2 * product(query, spread, PRECISION)
            tl.store(p_dlog + i_head * length + o_query, dlog, mask=m_query)
        dquery = dquery * D**-0.5 + dlog[:, None] * slope
        _add_to(p_dquery + out, o_query, m_query, num_heads * D, dquery, D)
        i_part = i_head * (tl.num_programs(0) // 2) + i_tile * BLOCKS + i_block
        dslope = tl.sum(dlog[:, None] * query.to(tl.float32), 0)
        tl.store(p_dslope + i_part * D + tl.arange(0, D), dslope)
        tl.store(p_dlevel + i_part, tl.sum(dlog, 0))


@triton.jit
def moments_kernel(
    p_x, p_weights, p_sums, p_products, x_b, x_l, x_n, length, split_length, num_heads,
    D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, IS_WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sum w x and w x x' over one split's tokens: [B N, splits, D] and [B N, splits, D, D] fp32."""
    i_split, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_x += i_head // num_heads * x_b + i_head % num_heads * x_n
    first = i_split * split_length
    last = tl.minimum(first + split_length, length)
    total = tl.zeros((D,), tl.float32)
    products = tl.zeros((D, D), tl.float32)
    for start in range(first, last, BLOCK):
        o_l = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x = _load_tokens(p_x, x_l, o_l, o_l < last, D)
        weighted = x.to(tl.float32)
        if IS_WEIGHTED:
            weights = tl.load(p_weights + i_head * length + o_l, mask=o_l < last, other=0.0)
            weighted *= weights[:, None]
        total += tl.sum(weighted, 0)
        products = dot(tl.trans(x.to(DTYPE)), weighted.to(DTYPE), products, PRECISION)
    i_part = i_head * tl.num_programs(0) + i_split
    tl.store(p_sums + i_part * D + tl.arange(0, D), total)
    store_matrix(p_products + i_part * D * D, products, D, D)
