r"""Linear attention with the Hedgehog map as Triton kernels: features are never written to memory.

With a = phi(q), b = phi(k), [L, M] per head and video, LinVideo eq. 3 is a mean of means, so that
nothing overflows, whatever the length:

    means       s_m = sum_j b_jm v_j / sum_j b_jm           the values' mean under feature m
    normaliser  n_m = mean_j b_jm
    weights     w_im = a_im n_m / sum_m' a_im' n_m'         they add up to 1
    output      o_i = sum_m w_im s_m

Backward needs two more states of the same shapes, both divided by sum_j b_jm:

    G_m = sum_i w_im do_i       c_m = sum_i w_im (do_i o_i)
    dv_j = sum_m b_jm G_m       a da = w (do s - do o)       b db = b (v G - c)

`reduce_kernel` sums features times rows over the tokens (keys: b and v; queries: w and do),
`map_kernel` multiplies features with a state (o from w and means, dv from b and G),
`backward_query_kernel` and `backward_key_kernel` write dq and dk and their maps' gradients. The
queries' leaves three numbers a token, from which the sums over queries have each weight in one
exponential. Tokens are split to fill the card; splits are added up in order and depend on the shape
alone, so that results are the same bit for bit. Backward's kernels are chained where the card can:
each is launched while the one before still runs, takes the places that become free, and waits.

Kernel locals: i_ program index, o_ offsets, p_ pointer. x is the side's query or key, y its output
gradient or value, H = M/2 the width of either half of the features.
"""

import os

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton < 3.4 has no dependent launch: one kernel after another is as right
    gdc_launch_dependents = gdc_wait = None

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"Triton {triton.__version__} is installed; 3.3 or newer is needed")

KNOWS_DEPENDENTS = gdc_wait is not None
IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Weights that add up to less have no mean. Their inverse may be multiplied by any value.
_LEAST_WEIGHT = tl.constexpr(2.0**-100)
# The tensor cores' narrowest tile: sums over tokens are products with this many equal columns.
_COLUMNS = tl.constexpr(16)
# Parts of a sum that are loaded at once: one after another they would take their latency each.
_PARTS = tl.constexpr(16)


@triton.jit
def _take_turn(IS_CHAINED: tl.constexpr):
    """Wait until all that the kernel before wrote is there, and let the next start to wait."""
    if IS_CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _load_tokens(p_x, stride, start, last, BLOCK: tl.constexpr, D: tl.constexpr):
    o_l = tl.arange(0, BLOCK)
    p_x += tl.cast(start, tl.int64) * stride
    p_tile = p_x + o_l[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(p_tile, mask=(start + o_l < last)[:, None], other=0.0)


@triton.jit
def _store_tokens(p_x, stride, start, last, tile, BLOCK: tl.constexpr, D: tl.constexpr):
    o_l = tl.arange(0, BLOCK)
    p_x += tl.cast(start, tl.int64) * stride
    p_tile = p_x + o_l[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(p_tile, tile.to(p_x.dtype.element_ty), mask=(start + o_l < last)[:, None])


@triton.jit
def load_matrix(p_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a contiguous matrix [ROWS, COLUMNS]."""
    return tl.load(p_x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def store_matrix(p_x, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a contiguous matrix [ROWS, COLUMNS]."""
    p_tile = p_x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_tile, tile)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Return total plus the product of two tiles."""
    if IS_INTERPRETED:  # numpy has no bf16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """Return the product of two tiles, fp32."""
    if IS_INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _exponentials(projected):
    """Return exp(x) and exp(-x) over their rows' largest, their sums over columns, and those."""
    # The largest as powers of 2: one multiply-add each before the exponential.
    high, low = tl.max(projected, 1) * LOG2_E, tl.max(-projected, 1) * LOG2_E
    plus = tl.exp2(projected * LOG2_E - high[:, None])
    minus = tl.exp2(-projected * LOG2_E - low[:, None])
    return plus, minus, tl.sum(plus, 1), tl.sum(minus, 1), high, low


@triton.jit
def _features(projected):
    """Return softmax(x) and softmax(-x) over the columns, fp32."""
    plus, minus, total_plus, total_minus, _, _ = _exponentials(projected)
    return plus * (1 / total_plus)[:, None], minus * (1 / total_minus)[:, None]


@triton.jit
def to_weights(projected, n_plus, n_minus):
    """Return the features times the normaliser, scaled to add up to 1 over both halves."""
    plus, minus, total_plus, total_minus, _, _ = _exponentials(projected)
    plus, minus = plus * n_plus[None, :], minus * n_minus[None, :]
    total = tl.sum(plus, 1) / total_plus + tl.sum(minus, 1) / total_minus
    scale = 1 / tl.maximum(total, _LEAST_WEIGHT)
    return plus * (scale / total_plus)[:, None], minus * (scale / total_minus)[:, None]


@triton.jit
def reduce_kernel(
    p_x, p_y, p_rows, p_map, p_normaliser, p_states, p_sums,
    x_b, x_l, x_n, y_b, y_l, y_n,
    length, split_length, num_heads,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, IS_QUERY: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum over the tokens of one split: keys b^T v and b; queries w^T do and w^T (do o).

    states: [B N, splits, M, D] fp32; sums: [B N, splits, M] fp32; rows, for queries: as
    `backward_query_kernel` wrote them.
    """
    _take_turn(IS_CHAINED)
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_head // num_heads).to(tl.int64), i_head % num_heads
    p_x += i_b * x_b + i_n * x_n
    p_y += i_b * y_b + i_n * y_n
    first = i_split * split_length
    last = tl.minimum(first + split_length, length)
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    if IS_QUERY:
        p_rows += i_head.to(tl.int64) * 4 * length
        p_normaliser += i_head * 2 * H + tl.arange(0, H)
        n_plus, n_minus = tl.load(p_normaliser), tl.load(p_normaliser + H)
    state_plus = tl.zeros((H, D), tl.float32)
    state_minus = tl.zeros((H, D), tl.float32)
    sum_plus = tl.zeros((H, _COLUMNS), tl.float32)
    sum_minus = tl.zeros((H, _COLUMNS), tl.float32)
    for start in range(first, last, BLOCK):
        x = _load_tokens(p_x, x_l, start, last, BLOCK, D).to(feature_map.dtype)
        y = _load_tokens(p_y, y_l, start, last, BLOCK, D)
        projected = product(x, feature_map, PRECISION)
        o_l = start + tl.arange(0, BLOCK)
        if IS_QUERY:
            p_row = p_rows + o_l * 4
            column = tl.load(p_row, mask=o_l < last, other=0.0)
            # Beyond the end: exp2 of minus infinity, no weight.
            high = tl.load(p_row + 2, mask=o_l < last, other=float("inf"))
            low = tl.load(p_row + 3, mask=o_l < last, other=float("inf"))
            plus = tl.exp2(projected * LOG2_E - high[:, None]) * n_plus[None, :]
            minus = tl.exp2(-projected * LOG2_E - low[:, None]) * n_minus[None, :]
        else:
            plus, minus = _features(projected)
            # Tokens beyond the end are zeros, and so are their values, but not their features.
            column = tl.where(o_l < last, 1.0, 0.0)
        columns = tl.broadcast_to(column[:, None], (BLOCK, _COLUMNS)).to(FEATURES)
        plus, minus = tl.trans(plus.to(FEATURES)), tl.trans(minus.to(FEATURES))
        y = y.to(FEATURES)
        state_plus = dot(plus, y, state_plus, PRECISION)
        state_minus = dot(minus, y, state_minus, PRECISION)
        sum_plus = dot(plus, columns, sum_plus, PRECISION)
        sum_minus = dot(minus, columns, sum_minus, PRECISION)
    i_part = i_head.to(tl.int64) * tl.num_programs(0) + i_split
    store_matrix(p_states + i_part * 2 * H * D, state_plus, H, D)
    store_matrix(p_states + i_part * 2 * H * D + H * D, state_minus, H, D)
    p_sums += i_part * 2 * H + tl.arange(0, H)
    # All columns are alike.
    tl.store(p_sums, tl.max(sum_plus, 1))
    tl.store(p_sums + H, tl.max(sum_minus, 1))


@triton.jit
def add_splits_kernel(
    p_states, p_sums, p_normaliser, p_out_states, p_out_sums, length, num_splits,
    M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    IS_QUERY: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Add the splits up: [B N, splits, M, D] -> [B N, M, D], and divide by sum_j b_jm.

    For keys the sums themselves are sum_j b_jm and become the normaliser; for queries it is read,
    and the sums are divided as the states are.
    """
    _take_turn(IS_CHAINED)
    i_rows, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_rows * ROWS + tl.arange(0, ROWS)
    o_tile = o_m[:, None] * D + tl.arange(0, D)[None, :]
    state = tl.zeros((ROWS, D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i_split in range(num_splits):
        i_part = i_head * num_splits + i_split
        state += tl.load(p_states + i_part * M * D + o_tile)
        total += tl.load(p_sums + i_part * M + o_m)
    count = tl.load(p_normaliser + i_head * M + o_m) * length if IS_QUERY else total
    # A feature that no key has weighs nothing: its state may be anything finite.
    share = 1 / tl.maximum(count, _TINY)
    state = (state * share[:, None]).to(p_out_states.dtype.element_ty)
    tl.store(p_out_states + i_head * M * D + o_tile, state)
    tl.store(p_out_sums + i_head * M + o_m, total * share if IS_QUERY else total / length)


@triton.jit
def add_map_gradients_kernel(
    p_query_parts, p_key_parts, p_dquery_map, p_dkey_map, num_videos, query_splits, key_splits,
    SIZE: tl.constexpr, TILE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Add up both sides' map gradients, [B, N, splits, D H] -> [N, D H]; SIZE is D H."""
    _take_turn(IS_CHAINED)
    if tl.program_id(2) == 0:
        _add_map_gradient(p_query_parts, p_dquery_map, num_videos, query_splits, SIZE, TILE)
    else:
        _add_map_gradient(p_key_parts, p_dkey_map, num_videos, key_splits, SIZE, TILE)


@triton.jit
def _add_map_gradient(
    p_parts, p_dmap, num_videos, num_splits, SIZE: tl.constexpr, TILE: tl.constexpr
):
    i_tile, i_n, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_tile = i_tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for i_b in range(num_videos):
        p_video = p_parts + (i_b * num_heads + i_n).to(tl.int64) * num_splits * SIZE
        for first in range(0, num_splits, _PARTS):
            o_part = first + tl.arange(0, _PARTS)
            p_tile = p_video + o_part[:, None] * SIZE + o_tile[None, :]
            total += tl.sum(tl.load(p_tile, mask=(o_part < num_splits)[:, None], other=0.0), 0)
    tl.store(p_dmap + i_n * SIZE + o_tile, total.to(p_dmap.dtype.element_ty))


@triton.jit
def map_kernel(
    p_x, p_map, p_states, p_normaliser, p_out,
    x_b, x_l, x_n, out_b, out_l, out_n,
    length, split_length, num_heads,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, IS_QUERY: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Write features times state for one split's tokens: queries o = w s, keys dv = b G."""
    _take_turn(IS_CHAINED)
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_head // num_heads).to(tl.int64), i_head % num_heads
    p_x += i_b * x_b + i_n * x_n
    p_out += i_b * out_b + i_n * out_n
    first = i_split * split_length
    last = tl.minimum(first + split_length, length)
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    p_states += i_head.to(tl.int64) * 2 * H * D
    state_plus = load_matrix(p_states, H, D)
    state_minus = load_matrix(p_states + H * D, H, D)
    if IS_QUERY:
        p_normaliser += i_head * 2 * H + tl.arange(0, H)
        n_plus, n_minus = tl.load(p_normaliser), tl.load(p_normaliser + H)
    for start in range(first, last, BLOCK):
        x = _load_tokens(p_x, x_l, start, last, BLOCK, D).to(feature_map.dtype)
        projected = product(x, feature_map, PRECISION)
        if IS_QUERY:
            plus, minus = to_weights(projected, n_plus, n_minus)
        else:
            plus, minus = _features(projected)
        out = product(plus.to(state_plus.dtype), state_plus, PRECISION)
        out = dot(minus.to(state_plus.dtype), state_minus, out, PRECISION)
        _store_tokens(p_out, out_l, start, last, out, BLOCK, D)


@triton.jit
def _pull_back_weights(
    plus, minus, total_plus, total_minus, slope_plus, slope_minus, n_plus, n_minus, share
):
    """Return the gradient of x W, do o, and what scales either half's exponentials to weights.

    plus, minus, totals: of `_exponentials`; slopes: do s; share: the weights' sum.
    """
    # Until the rows are scaled, weights lack 1 / total of their half and 1 / weight of both.
    w_plus, w_minus = plus * n_plus[None, :], minus * n_minus[None, :]
    weight_plus, weight_minus = tl.sum(w_plus, 1) / total_plus, tl.sum(w_minus, 1) / total_minus
    along_plus = tl.sum(w_plus * slope_plus, 1) / total_plus
    along_minus = tl.sum(w_minus * slope_minus, 1) / total_minus
    scale = 1 / tl.maximum(weight_plus + weight_minus, _LEAST_WEIGHT)
    along = scale * (along_plus + along_minus)
    scale *= share
    scale_plus, scale_minus = scale / total_plus, scale / total_minus
    # Softmax's gradient: a da less a times its sum over the half.
    drawn_plus = scale_plus * (along_plus - along * weight_plus)
    drawn_minus = scale_minus * (along_minus - along * weight_minus)
    # Each (slope - along) scale n - drawn as two multiply-adds.
    slope_plus = slope_plus * scale_plus[:, None] - (along * scale_plus)[:, None]
    slope_minus = slope_minus * scale_minus[:, None] - (along * scale_minus)[:, None]
    dz = plus * (slope_plus * n_plus[None, :] - drawn_plus[:, None])
    dz -= minus * (slope_minus * n_minus[None, :] - drawn_minus[:, None])
    return dz, along, scale_plus, scale_minus


@triton.jit
def backward_query_kernel(
    p_query, p_upstream, p_map, p_means, p_normaliser, p_out, p_far, p_dquery, p_rows, p_dmap,
    query_b, query_l, query_n, upstream_b, upstream_l, upstream_n, dquery_b, dquery_l, dquery_n,
    length, split_length, num_heads,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, MAP_GRADIENT: tl.constexpr, IS_MIXED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Write dq of one split's queries and their rows; sum the map's gradient over them.

    rows: [B N, L, 4] fp32, do o twice and, of either half, what makes
    exp2(+-x log2(e) - row) n the weights w; dmap: [B N, splits, D, H] fp32.
    Mixed: linear attention is the share far [B N, L] of out [B, L, N, D], contiguous; the second
    number is do out then, and w has that share as a factor.
    """
    _take_turn(IS_CHAINED)
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_head // num_heads).to(tl.int64), i_head % num_heads
    p_query += i_b * query_b + i_n * query_n
    p_upstream += i_b * upstream_b + i_n * upstream_n
    p_dquery += i_b * dquery_b + i_n * dquery_n
    p_out += i_b * dquery_b + i_n * dquery_n
    p_far += i_head.to(tl.int64) * length
    p_rows += i_head.to(tl.int64) * 4 * length
    first = i_split * split_length
    last = tl.minimum(first + split_length, length)
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    p_means += i_head.to(tl.int64) * 2 * H * D
    means_plus = load_matrix(p_means, H, D)
    means_minus = load_matrix(p_means + H * D, H, D)
    p_normaliser += i_head * 2 * H + tl.arange(0, H)
    map_gradient = tl.zeros((D, H), tl.float32)
    for start in range(first, last, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        query = _load_tokens(p_query, query_l, start, last, BLOCK, D).to(feature_map.dtype)
        upstream = _load_tokens(p_upstream, upstream_l, start, last, BLOCK, D)
        upstream = upstream.to(means_plus.dtype)
        if IS_MIXED:
            out = _load_tokens(p_out, dquery_l, start, last, BLOCK, D)
            whole = tl.sum(upstream.to(tl.float32) * out.to(tl.float32), 1)
            share = tl.load(p_far + o_l, mask=o_l < last, other=1.0)
        else:
            share = 1.0
        projected = product(query, feature_map, PRECISION)
        plus, minus, total_plus, total_minus, high, low = _exponentials(projected)
        slope_plus = product(upstream, tl.trans(means_plus), PRECISION)
        slope_minus = product(upstream, tl.trans(means_minus), PRECISION)
        # Read at every block: registers are what this kernel is short of.
        n_plus, n_minus = tl.load(p_normaliser), tl.load(p_normaliser + H)
        dz, along, scale_plus, scale_minus = _pull_back_weights(
            plus, minus, total_plus, total_minus, slope_plus, slope_minus, n_plus, n_minus, share
        )
        dz = dz.to(feature_map.dtype)
        dquery = product(dz, tl.trans(feature_map), PRECISION)
        _store_tokens(p_dquery, dquery_l, start, last, dquery, BLOCK, D)
        # Four numbers a token, one of them perhaps twice: written at once, as threads must trade
        # places to write and each time all wait for one another.
        high, low = high - tl.log2(scale_plus), low - tl.log2(scale_minus)
        whole = whole if IS_MIXED else along
        row = tl.reshape(tl.join(tl.join(along, high), tl.join(whole, low)), (BLOCK, 4))
        p_tile = p_rows + o_l[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(p_tile, row, mask=(o_l < last)[:, None])
        if MAP_GRADIENT:
            # Tokens beyond the end are zeros: their rows of dz meet nothing.
            map_gradient = dot(tl.trans(query), dz, map_gradient, PRECISION)
    if MAP_GRADIENT:
        i_part = i_head.to(tl.int64) * tl.num_programs(0) + i_split
        store_matrix(p_dmap + i_part * D * H, map_gradient, D, H)


@triton.jit
def backward_key_kernel(
    p_key, p_value, p_map, p_states, p_sums, p_dkey, p_dmap,
    key_b, key_l, key_n, value_b, value_l, value_n, dkey_b, dkey_l, dkey_n,
    length, split_length, num_heads,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, MAP_GRADIENT: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Write dk of one split's keys; sum the map's gradient over them.

    states, sums: G and c; dmap: [B N, splits, D, H] fp32.
    """
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_head // num_heads).to(tl.int64), i_head % num_heads
    p_key += i_b * key_b + i_n * key_n
    p_value += i_b * value_b + i_n * value_n
    p_dkey += i_b * dkey_b + i_n * dkey_n
    first = i_split * split_length
    last = tl.minimum(first + split_length, length)
    feature_map = load_matrix(p_map + i_n * D * H, D, H)
    p_states += i_head.to(tl.int64) * 2 * H * D
    state_plus = load_matrix(p_states, H, D)
    state_minus = load_matrix(p_states + H * D, H, D)
    p_sums += i_head * 2 * H + tl.arange(0, H)
    map_gradient = tl.zeros((D, H), tl.float32)
    for start in range(first, last, BLOCK):
        key = _load_tokens(p_key, key_l, start, last, BLOCK, D).to(feature_map.dtype)
        value = _load_tokens(p_value, value_l, start, last, BLOCK, D).to(state_plus.dtype)
        plus, minus = _features(product(key, feature_map, PRECISION))
        sum_plus, sum_minus = tl.load(p_sums), tl.load(p_sums + H)
        slope_plus = product(value, tl.trans(state_plus), PRECISION) - sum_plus[None, :]
        slope_minus = product(value, tl.trans(state_minus), PRECISION) - sum_minus[None, :]
        slope_plus, slope_minus = plus * slope_plus, minus * slope_minus
        slope_plus -= plus * tl.sum(slope_plus, 1)[:, None]
        slope_minus -= minus * tl.sum(slope_minus, 1)[:, None]
        dz = (slope_plus - slope_minus).to(feature_map.dtype)
        dkey = product(dz, tl.trans(feature_map), PRECISION)
        _store_tokens(p_dkey, dkey_l, start, last, dkey, BLOCK, D)
        if MAP_GRADIENT:
            # Tokens beyond the end are zeros: their rows of dz meet nothing.
            map_gradient = dot(tl.trans(key), dz, map_gradient, PRECISION)
    if MAP_GRADIENT:
        i_part = i_head.to(tl.int64) * tl.num_programs(0) + i_split
        store_matrix(p_dmap + i_part * D * H, map_gradient, D, H)
    # Nothing here is of the kernel before, which writes dv: it is only waited for so that whoever
    # waits for this one has waited for both.
    _take_turn(IS_CHAINED)
