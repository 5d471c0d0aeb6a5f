"""Launching the fused kernels: how tokens are split, how large blocks are, what is allocated.

No launch depends on the length, so a new length compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .fused_kernels import add_splits_kernel, backward_kernel, map_kernel, reduce_kernel

# Splits fill the card, but their partial states may not take more than this.
_MAX_PARTIAL_BYTES = 14 * 2**20
# Features of a state that one program adds up.
_ROWS = 8

# Features lie in [0, 1]: bf16 keeps their small values, where fp16 would round them to nothing.
_FEATURE_DTYPES = {
    torch.float16: torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
}
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Launch(NamedTuple):
    """Tokens of a block, warps, pipeline stages, programs that share a multiprocessor."""

    tokens: int
    warps: int
    stages: int
    programs: int


# Chosen on an H200, fastest first; a card with less shared memory takes a later one, and so do fp32
# and M = 2D, which need more of it.
_LAUNCHES = {
    "reduce": (Launch(64, 4, 2, 2), Launch(128, 8, 1, 1), Launch(64, 4, 1, 1), Launch(32, 4, 1, 2)),
    "map": (Launch(64, 4, 3, 2), Launch(64, 4, 2, 2), Launch(64, 4, 1, 2), Launch(32, 4, 1, 2)),
    "backward": (
        Launch(128, 8, 2, 1),
        Launch(64, 8, 1, 1),
        Launch(64, 4, 1, 1),
        Launch(32, 4, 1, 1),
    ),
}
_first_launch: dict[tuple[Any, ...], int] = {}


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D], means [B, N, M, D] and normaliser [B, N, M] fp32.

    query, key, value: [B, L, N, D], last axis contiguous. query_map, key_map: [N, D, M/2].
    """
    query_map, key_map = (x.to(value.dtype).contiguous() for x in (query_map, key_map))
    means, normaliser = _call(_run_reduce, key_map, key, value)
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    _call(_run_map, query_map, query, means, out, normaliser)
    return out, means, normaliser


def backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    means: Tensor,
    normaliser: Tensor,
    *,
    needs_map_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and both maps; the maps' fp32, 0 if unwanted.

    upstream: [B, L, N, D], the output's gradient; means and normaliser as `forward` gave them.
    """
    query_map, key_map = (x.to(value.dtype).contiguous() for x in (query_map, key_map))
    dq, along, dquery_map = _call(
        _run_backward, query_map, query, upstream, means, normaliser, True, needs_map_gradients
    )
    states, sums = _call(
        _run_reduce, query_map, query, upstream, along, normaliser, num_keys=key.shape[1]
    )
    dv = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    _call(_run_map, key_map, key, states, dv)
    dk, _, dkey_map = _call(
        _run_backward, key_map, key, value, states, sums, False, needs_map_gradients
    )
    return dq, dk, dv, dquery_map, dkey_map


def _run_reduce(
    launch: Launch,
    feature_map: Tensor,
    x: Tensor,
    y: Tensor,
    along: Tensor | None = None,
    normaliser: Tensor | None = None,
    *,
    num_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return a side's state [B, N, M, D] and sums [B, N, M] fp32, both divided by sum_j b_jm.

    Keys: means and normaliser. Queries, which have `along`: G and c; num_keys is the keys' L.
    """
    B, L, N, D = x.shape
    H = feature_map.shape[2]
    is_query = along is not None
    features = _FEATURE_DTYPES[feature_map.dtype]
    splits, split_length = _split(L, B * N, launch, x.device, state_bytes=8 * H * (D + 1))
    state_parts = _fp32(x, B, N, splits, 2 * H, D)
    sum_parts = _fp32(x, B, N, splits, 2 * H)
    along, counts = (along, normaliser) if is_query else (sum_parts, sum_parts)
    reduce_kernel[splits, B * N](
        x, y, along, feature_map, counts, state_parts, sum_parts,
        *x.stride()[:3], *y.stride()[:3], L, split_length, N,
        D, H, launch.tokens, _TRITON_DTYPES[features], _precision(feature_map), is_query,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    states = torch.empty(B, N, 2 * H, D, dtype=features, device=x.device)
    sums = _fp32(x, B, N, 2 * H)
    add_splits_kernel[2 * H // _ROWS, B * N](
        state_parts, sum_parts, counts, states, sums,
        num_keys if is_query else L, splits, 2 * H, D, _ROWS, is_query, num_warps=4,
    )  # fmt: skip
    return states, sums


def _run_map(
    launch: Launch,
    feature_map: Tensor,
    x: Tensor,
    states: Tensor,
    out: Tensor,
    normaliser: Tensor | None = None,
) -> None:
    """Write features times states to `out`; with a normaliser the features are weights."""
    B, L, N, D = x.shape
    splits, split_length = _split(L, B * N, launch, x.device)
    map_kernel[splits, B * N](
        x, feature_map, states, states if normaliser is None else normaliser, out,
        *x.stride()[:3], *out.stride()[:3], L, split_length, N,
        D, feature_map.shape[2], launch.tokens, _precision(feature_map), normaliser is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _run_backward(
    launch: Launch,
    feature_map: Tensor,
    x: Tensor,
    y: Tensor,
    states: Tensor,
    sums: Tensor,
    is_query: bool,
    needs_map_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of a side's tokens, `along` [B, N, L], and the map's gradient, fp32."""
    B, L, N, D = x.shape
    H = feature_map.shape[2]
    state_bytes = 4 * D * H * needs_map_gradient
    splits, split_length = _split(L, B * N, launch, x.device, state_bytes=state_bytes)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    along = _fp32(x, B, N, L if is_query else 0)
    parts = _fp32(x, B, N, splits if needs_map_gradient else 0, D, H)
    backward_kernel[splits, B * N](
        x, y, feature_map, states, sums, dx, along, parts,
        *x.stride()[:3], *y.stride()[:3], *dx.stride()[:3], L, split_length, N,
        D, H, launch.tokens, _precision(feature_map), is_query, needs_map_gradient,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return dx, along, parts.sum(dim=(0, 2))


def _call(
    run: Callable[..., Any], feature_map: Tensor, x: Tensor, *arguments: Any, **settings: Any
) -> Any:
    """Run a kernel with the first launch, fastest first, that this card has the memory for."""
    launches = _LAUNCHES[run.__name__.removeprefix("_run_")]
    key = (run, x.device, feature_map.dtype, *feature_map.shape[1:])
    is_wide = feature_map.dtype == torch.float32 or 2 * feature_map.shape[2] > x.shape[3]
    first = _first_launch.get(key, int(is_wide))
    for i, launch in enumerate(launches[first:], start=first):
        try:
            result = run(launch, feature_map, x, *arguments, **settings)
        except OutOfResources:
            if i + 1 == len(launches):
                raise
        else:
            _first_launch[key] = i
            return result
    raise AssertionError("the last launch either returns or raises")


def _precision(feature_map: Tensor) -> str:
    """Return how products of fp32 are made: on tensor cores, in three parts, exact to 1e-6."""
    return "tf32x3" if feature_map.dtype == torch.float32 else "tf32"


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _split(
    length: int, num_heads: int, launch: Launch, device: torch.device, *, state_bytes: int = 0
) -> tuple[int, int]:
    """Return how many splits of the tokens fill the card, and their length, whole blocks."""
    most = launch.programs * _num_multiprocessors(device)
    if state_bytes:
        most = min(most, _MAX_PARTIAL_BYTES // state_bytes)
    blocks = triton.cdiv(length, launch.tokens)
    splits = max(1, min(blocks, most // num_heads))
    split_length = triton.cdiv(blocks, splits) * launch.tokens
    return triton.cdiv(length, split_length), split_length


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: a few programs, so that splits are exercised
    return torch.cuda.get_device_properties(device).multi_processor_count
