"""Launching the fused kernels: how tokens are split, how large blocks are, what is allocated.

No launch depends on the length. Triton compiles at the first length that 16 divides and at the
first that it does not, 2 to 4 seconds each, and never again.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from .triton_kernels import (
    IS_INTERPRETED,
    KNOWS_DEPENDENTS,
    add_map_gradients_kernel,
    add_splits_kernel,
    backward_key_kernel,
    backward_query_kernel,
    map_kernel,
    reduce_kernel,
)

# Splits fill the card, but their partial states may not take more than this.
_MAX_PARTIAL_BYTES = 36 * 2**20
# Programs run in waves: more waves leave less of the card idle in the last one, but each program
# reads the states and the map anew.
_WAVES = (1, 2, 4)
# Features of a state that one program adds up.
_ROWS = 8
# Elements of a map's gradient that one program adds up.
_TILE = 256

# Features lie in [0, 1]: bf16 keeps their small values, where fp16 would round them to nothing.
FEATURE_DTYPES = {
    torch.float16: (torch.bfloat16, tl.bfloat16),
    torch.bfloat16: (torch.bfloat16, tl.bfloat16),
    torch.float32: (torch.float32, tl.float32),
}


class Launch(NamedTuple):
    """Tokens of a block, warps, pipeline stages, programs that share a multiprocessor."""

    tokens: int
    warps: int
    stages: int
    programs: int


# Of Hopper. Chosen on an H200, fastest first; fp32 and M = 2D, which need more shared memory, take
# a later one.
_LAUNCHES = {
    kind: [Launch(*row) for row in rows]
    for kind, rows in {
        "reduce keys": ((64, 4, 2, 2), (128, 8, 1, 1), (64, 4, 1, 1), (32, 4, 1, 2)),
        "reduce queries": ((32, 4, 3, 2), (128, 8, 1, 1), (64, 4, 1, 1), (32, 4, 1, 2)),
        "map": ((64, 4, 3, 2), (64, 4, 2, 2), (64, 4, 1, 2), (32, 4, 1, 2)),
        "backward": ((128, 8, 2, 1), (64, 8, 1, 1), (64, 4, 1, 1), (32, 4, 1, 1)),
        "backward, maps frozen": ((64, 4, 1, 2), (64, 8, 1, 1), (64, 4, 1, 1), (32, 4, 1, 1)),
        # Linear attention as a share of what has the gradient: queries alone.
        "backward, mixed": ((64, 8, 1, 1),),
        "hybrid": ((128, 8, 3, 1), (64, 4, 2, 1), (64, 4, 1, 1), (32, 4, 1, 1)),
        # Not pipelined: its tokens are also summed in registers, and then Triton 3.6 and 3.9 refill
        # on Hopper the only buffer while a product still reads it (triton-lang/triton#7110).
        "moments": ((64, 4, 1, 2),),
        "hybrid backward": ((128, 8, 1, 1), (64, 4, 2, 1), (64, 4, 1, 1), (32, 4, 1, 1)),
    }.items()
}
# Of Blackwell's servers, where Triton 3.6 cannot compile the reduction of keys pipelined.
_BLACKWELL_LAUNCHES = _LAUNCHES | {"reduce keys": [Launch(64, 4, 1, 2), Launch(32, 4, 1, 2)]}
# Of NVIDIA's other cards, then AMD's, whose warps are twice as wide. None was measured: these
# launches fit 99 KB of shared memory and spill fewest registers (tests/kernels/test_targets.py).
_SMALL_LAUNCHES = {kind: [Launch(32, 8, 1, 1)] for kind in _LAUNCHES}
_SMALL_LAUNCHES["map"] = [Launch(64, 4, 1, 1)]
_SMALL_LAUNCHES["hybrid"] = [Launch(64, 8, 1, 1), Launch(32, 8, 1, 1)]
_SMALL_LAUNCHES["hybrid backward"] = [Launch(32, 8, 1, 1), Launch(16, 8, 1, 1)]
_AMD_LAUNCHES = {kind: [Launch(32, 4, 1, 1)] for kind in _LAUNCHES}
_AMD_LAUNCHES["backward, mixed"] = [Launch(16, 4, 1, 1)]
_first_launch: dict[tuple[Any, ...], int] = {}


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D], means [B, N, M, D] and normaliser [B, N, M] fp32.

    query, key, value: [B, L, N, D], last axis contiguous. query_map, key_map: [N, D, M/2].
    """
    query_map, key_map = (x.to(value.dtype).contiguous() for x in (query_map, key_map))
    means, normaliser = reduce_keys(key_map, key, value)
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    call("map", _run_map, query_map, query, means, out, normaliser)
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
    """Return the gradients of query, key, value and both maps, in their dtypes; 0 if unwanted.

    upstream: [B, L, N, D], the output's gradient; means and normaliser as `forward` gave them.
    """
    tensors = (upstream, query, key, value, query_map, key_map, means, normaliser)
    return pull_back(*tensors, needs_map_gradients=needs_map_gradients)[0]


def pull_back(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    means: Tensor,
    normaliser: Tensor,
    mixed: tuple[Tensor, Tensor] | None = None,
    *,
    needs_map_gradients: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return what `backward` does, and the queries' rows, see `backward_query_kernel`.

    mixed: where linear attention is a part of what has the gradient, that whole [B, L, N, D],
        contiguous, and the part's share of it [B, N, L] fp32.
    """
    maps = (query_map, key_map)
    query_map, key_map = (x.to(value.dtype).contiguous() for x in maps)
    kind = "backward" if needs_map_gradients else "backward, maps frozen"
    settings = {"needs_map_gradient": needs_map_gradients}
    arguments = (query_map, query, upstream, means, normaliser, mixed)
    query_kind = "backward, mixed" if mixed else kind
    dq, rows, query_parts = call(query_kind, _run_backward_query, *arguments, **settings)
    arguments = (query_map, query, upstream, rows, normaliser)
    states, sums = call("reduce queries", _run_reduce, *arguments, num_keys=key.shape[1])
    dv = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    call("map", _run_map, key_map, key, states, dv)
    dk, key_parts = call(kind, _run_backward_key, key_map, key, value, states, sums, **settings)
    if needs_map_gradients:
        map_gradients = _add_map_gradients((query_parts, key_parts), maps)
    else:
        map_gradients = tuple(x.new_zeros(x.shape) for x in maps)
    return (dq, dk, dv, *map_gradients), rows


def reduce_keys(key_map: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys' means [B, N, M, D] and normaliser [B, N, M] fp32.

    key_map: [N, D, M/2], contiguous, in value's dtype.
    """
    return call("reduce keys", _run_reduce, key_map, key, value)


def _add_map_gradients(
    parts: tuple[Tensor, Tensor], maps: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the maps' gradients [N, D, H] from their parts [B, N, splits, D, H], in one launch."""
    B, N, _, D, H = parts[0].shape
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in maps)
    add_map_gradients_kernel[D * H // _TILE, N, 2](
        *parts, *gradients, B, parts[0].shape[2], parts[1].shape[2], D * H, _TILE,
        num_warps=4, **_options(parts[0].device),
    )  # fmt: skip
    return gradients


def _run_reduce(
    launch: Launch,
    feature_map: Tensor,
    x: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    normaliser: Tensor | None = None,
    *,
    num_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return a side's state [B, N, M, D] and sums [B, N, M] fp32, both divided by sum_j b_jm.

    Keys: means and normaliser. Queries, which have `rows`: G and c; num_keys is the keys' L.
    """
    B, L, N, D = x.shape
    H = feature_map.shape[2]
    is_query = rows is not None
    features, triton_features = FEATURE_DTYPES[feature_map.dtype]
    splits, split_length = split_tokens(L, B * N, launch, x.device, state_bytes=8 * H * (D + 1))
    state_parts = _fp32(x, B, N, splits, 2 * H, D)
    sum_parts = _fp32(x, B, N, splits, 2 * H)
    rows, counts = (rows, normaliser) if is_query else (sum_parts, sum_parts)
    reduce_kernel[splits, B * N](
        x, y, rows, feature_map, counts, state_parts, sum_parts,
        *x.stride()[:3], *y.stride()[:3], L, split_length, N,
        D, H, launch.tokens, triton_features, product_precision(feature_map), is_query,
        num_warps=launch.warps, num_stages=launch.stages, **_options(x.device, is_query),
    )  # fmt: skip
    states = torch.empty(B, N, 2 * H, D, dtype=features, device=x.device)
    sums = _fp32(x, B, N, 2 * H)
    add_splits_kernel[2 * H // _ROWS, B * N](
        state_parts, sum_parts, counts, states, sums,
        num_keys if is_query else L, splits, 2 * H, D, _ROWS, is_query,
        num_warps=4, **_options(x.device, is_query),
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
    is_query = normaliser is not None
    splits, split_length = split_tokens(L, B * N, launch, x.device)
    map_kernel[splits, B * N](
        x, feature_map, states, normaliser if is_query else states, out,
        *x.stride()[:3], *out.stride()[:3], L, split_length, N,
        D, feature_map.shape[2], launch.tokens, product_precision(feature_map), is_query,
        num_warps=launch.warps, num_stages=launch.stages, **_options(x.device, not is_query),
    )  # fmt: skip


def _run_backward_query(
    launch: Launch,
    query_map: Tensor,
    query: Tensor,
    upstream: Tensor,
    means: Tensor,
    normaliser: Tensor,
    mixed: tuple[Tensor, Tensor] | None,
    *,
    needs_map_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, the queries' rows [B, N, L, 4] for `_run_reduce`, and the map's gradients.

    They are fp32, [B, N, splits, D, H], and yet to be added up.
    """
    B, L, N, D = query.shape
    splits, split_length, parts = _split_map_gradient(query, query_map, launch, needs_map_gradient)
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = _fp32(query, B, N, L, 4)
    backward_query_kernel[splits, B * N](
        query, upstream, query_map, means, normaliser, *(mixed or (upstream, rows)),
        dquery, rows, parts,
        *query.stride()[:3], *upstream.stride()[:3], *dquery.stride()[:3], L, split_length, N,
        D, query_map.shape[2], launch.tokens, product_precision(query_map), needs_map_gradient,
        mixed is not None,
        num_warps=launch.warps, num_stages=launch.stages, **_options(query.device),
    )  # fmt: skip
    return dquery, rows, parts


def _run_backward_key(
    launch: Launch,
    key_map: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    sums: Tensor,
    *,
    needs_map_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return dk and the map's gradients, as `_run_backward_query` does."""
    B, L, N, D = key.shape
    splits, split_length, parts = _split_map_gradient(key, key_map, launch, needs_map_gradient)
    dkey = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    backward_key_kernel[splits, B * N](
        key, value, key_map, states, sums, dkey, parts,
        *key.stride()[:3], *value.stride()[:3], *dkey.stride()[:3], L, split_length, N,
        D, key_map.shape[2], launch.tokens, product_precision(key_map), needs_map_gradient,
        num_warps=launch.warps, num_stages=launch.stages, **_options(key.device),
    )  # fmt: skip
    return dkey, parts


def call(
    kind: str,
    run: Callable[..., Any],
    feature_map: Tensor,
    x: Tensor,
    *arguments: Any,
    **settings: Any,
) -> Any:
    """Run a kernel with the first launch of its kind that this card has the memory for."""
    launches = launches_of(x.device, feature_map.dtype)[kind]
    key = (run, kind, x.device, feature_map.dtype, *feature_map.shape[1:])
    is_wide = feature_map.dtype == torch.float32 or 2 * feature_map.shape[2] > x.shape[3]
    first = _first_launch.get(key, int(is_wide and len(launches) > 1))
    for i, launch in enumerate(launches[first:], start=first):
        _first_launch[key] = i
        try:
            return run(launch, feature_map, x, *arguments, **settings)
        except OutOfResources:
            if launch is launches[-1]:
                raise
    raise AssertionError("the last launch either returns or raises")


def launches_of(device: torch.device, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """Return a card's launches by their kind, the fastest known first; dtype: of products."""
    architecture = _architecture(device)
    if IS_INTERPRETED or 90 <= architecture < 100:
        return _LAUNCHES
    # In fp32 Blackwell's servers spill 10 KB a thread with the launches that were chosen on Hopper.
    if 100 <= architecture < 120 and dtype != torch.float32:
        return _BLACKWELL_LAUNCHES
    return _SMALL_LAUNCHES if architecture else _AMD_LAUNCHES


@contextlib.contextmanager
def launched_as(
    launch: Launch, kind: str, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Let a kind of kernel have one launch alone, while the context lasts.

    OutOfResources is raised where the card has no memory for it.
    """
    launches = launches_of(device, dtype)
    usual, launches[kind] = launches[kind], [launch]
    _first_launch.clear()
    try:
        yield
    finally:
        launches[kind] = usual
        _first_launch.clear()


def _options(device: torch.device, is_backward: bool = True) -> dict[str, bool]:
    """Return how a kernel is compiled and launched: in backward as a dependent of the one before.

    Forward's three are not chained: on an H200 they took 2 % longer with 12 heads. Products and
    sums are fused into one instruction, which Triton 3.10 no longer does unless it is told.
    """
    is_chained = is_backward and _can_chain(device)
    chain = {"launch_pdl": True} if is_chained else {}
    return {"IS_CHAINED": is_chained, "enable_fp_fusion": True, **chain}


def product_precision(feature_map: Tensor) -> str:
    """Return how products of fp32 are made: on tensor cores, in three parts, exact to 1e-6.

    AMD's have no such parts, and those of narrower dtypes are what they are.
    """
    is_split = feature_map.dtype == torch.float32 and not torch.version.hip
    return "tf32x3" if is_split else "ieee"


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def split_tokens(
    length: int, num_heads: int, launch: Launch, device: torch.device, *, state_bytes: int = 0
) -> tuple[int, int]:
    """Return how many splits of the tokens fill the card best, and their length, whole blocks."""
    wave = launch.programs * _num_multiprocessors(device)
    most = _MAX_PARTIAL_BYTES // state_bytes if state_bytes else max(_WAVES) * wave
    programs = [min(wave * waves, most) // num_heads * num_heads for waves in _WAVES]
    fullest = max(programs, key=lambda count: count / (triton.cdiv(count, wave) * wave or 1))
    blocks = triton.cdiv(length, launch.tokens)
    splits = max(1, min(blocks, fullest // num_heads))
    split_length = triton.cdiv(blocks, splits) * launch.tokens
    return triton.cdiv(length, split_length), split_length


def _split_map_gradient(
    x: Tensor, feature_map: Tensor, launch: Launch, wanted: bool
) -> tuple[int, int, Tensor]:
    """Return splits, their length, and room for their map's gradients [B, N, splits, D, H]."""
    B, L, N, D = x.shape
    H = feature_map.shape[2]
    splits, split_length = split_tokens(L, B * N, launch, x.device, state_bytes=4 * D * H * wanted)
    return splits, split_length, _fp32(x, B, N, splits if wanted else 0, D, H)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: a few programs, so that splits are exercised
    return torch.cuda.get_device_properties(device).multi_processor_count


def _can_chain(device: torch.device) -> bool:
    return KNOWS_DEPENDENTS and _architecture(device) >= 90


@functools.cache
def _architecture(device: torch.device) -> int:
    """Return NVIDIA's number, such as 90 of sm_90; 0 of AMD's cards and the interpreter."""
    if IS_INTERPRETED:
        return 0
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
