"""The kernels as PyTorch custom operators, with closed-form gradients.

Opaque to the compiler, they run under torch.compile without a graph break, in CUDA graphs, under
autocast and activation checkpointing, whichever backend computes them. Triton launches on the
current GPU, so each operator makes that of its tensors the current one.
"""

import importlib
import itertools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import rotate
from .tiles import Tiles

BACKENDS = {"triton": "triton_launch", "reference": "reference"}

# A second copy of this package in a process, such as an installed one beside ComfyUI's, registers
# operators of its own: PyTorch would replace the first copy's by those of the same name.
_NAMESPACE = next(
    name
    for name in itertools.chain(["linvideo"], (f"linvideo_{i}" for i in itertools.count(2)))
    if not hasattr(getattr(torch.ops, name), "linear_attention")
)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _name_map(is_joint: bool) -> dict[str, bool]:
    """Return what tells a backend of a joint map: only one that knows it is asked."""
    return {"is_joint": True} if is_joint else {}


def _with_rows(x: Tensor) -> Tensor:
    """Return x with its last axis contiguous, which is how models hold it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::linear_attention", mutates_args=())
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    backend: str,
    is_joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D] and what backward needs: means and normaliser."""
    rows = (_with_rows(x) for x in (query, key, value))
    with torch.cuda.device_of(query):
        return _module(BACKENDS[backend]).forward(*rows, query_map, key_map, **_name_map(is_joint))


@linear_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, _: Tensor, backend: str, *__: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(query.shape), *_fake_states(value, query_map, backend)


def _fake_states(value: Tensor, feature_map: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the keys' means [B, N, M, D] and normaliser [B, N, M], without numbers."""
    B, _, N, D = value.shape
    M = 2 * feature_map.shape[2]
    is_half = backend == "triton" and value.dtype != torch.float32
    wide = torch.promote_types(value.dtype, torch.float32)
    means = value.new_empty(B, N, M, D, dtype=torch.bfloat16 if is_half else wide)
    return means, value.new_empty(B, N, M, dtype=wide)


@torch.library.custom_op(f"{_NAMESPACE}::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    means: Tensor,
    normaliser: Tensor,
    backend: str,
    needs_map_gradients: bool,
    is_joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, and of both maps (0 if unwanted)."""
    upstream, query, key, value = (_with_rows(x) for x in (upstream, query, key, value))
    with torch.cuda.device_of(query):
        *gradients, dquery_map, dkey_map = _module(BACKENDS[backend]).backward(
            upstream, query, key, value, query_map, key_map, means, normaliser,
            needs_map_gradients=needs_map_gradients, **_name_map(is_joint),
        )  # fmt: skip
    return *gradients, dquery_map.to(query_map.dtype), dkey_map.to(key_map.dtype)


@linear_attention_backward.register_fake
def _(upstream: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in tensors[:5])


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend, ctx.is_joint = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_attention(
    ctx: Any, upstream: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 7
    needs_map_gradients = any(ctx.needs_input_grad[3:5])
    gradients = linear_attention_backward(
        upstream, *ctx.saved_tensors, ctx.backend, needs_map_gradients, ctx.is_joint
    )
    wanted = zip(gradients, ctx.needs_input_grad[:5], strict=True)
    return *(gradient if is_wanted else None for gradient, is_wanted in wanted), None, None


linear_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


@torch.library.custom_op(f"{_NAMESPACE}::hybrid_attention", mutates_args=())
def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    level: Tensor,
    slope: Tensor,
    spread: Tensor | None,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D] and what backward needs, by the fused kernels.

    That is mass, means and normaliser of `hybrid_triton.forward`, which says what the inputs are;
    tiles: `Tiles.numbers`.
    """
    rows = (_with_rows(x) for x in (query, key, value))
    with torch.cuda.device_of(query):
        return _module("hybrid_triton").forward(
            *rows, query_map, key_map, level, slope, spread, Tiles.from_numbers(tiles)
        )


@hybrid_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, N, _ = query.shape
    mass = value.new_empty(2, B, N, L, dtype=torch.float32)
    return value.new_empty(query.shape), mass, *_fake_states(value, query_map, "triton")


@torch.library.custom_op(f"{_NAMESPACE}::hybrid_attention_backward", mutates_args=())
def hybrid_attention_backward(
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
    tiles: list[int],
    needs_map_gradients: bool,
) -> list[Tensor]:
    """Return the gradients of all tensors that `hybrid_attention` takes; the maps' 0 if unwanted.

    out, mass, means, normaliser: as that gave them.
    """
    rows = (_with_rows(x) for x in (upstream, query, key, value))
    with torch.cuda.device_of(query):
        gradients = _module("hybrid_triton").backward(
            *rows, query_map, key_map, level, slope, spread, out, mass, means, normaliser,
            Tiles.from_numbers(tiles), needs_map_gradients=needs_map_gradients,
        )  # fmt: skip
    return list(gradients)


@hybrid_attention_backward.register_fake
def _(upstream: Tensor, *tensors: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors[:8] if x is not None]


def _save_hybrid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.tiles = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate_hybrid(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    needs_map_gradients = any(ctx.needs_input_grad[3:5])
    gradients = hybrid_attention_backward(
        upstream, *ctx.saved_tensors, ctx.tiles, needs_map_gradients
    )
    # Without a spread there is one less.
    wanted = zip([*gradients, None], ctx.needs_input_grad[:8], strict=False)
    return *(gradient if is_wanted else None for gradient, is_wanted in wanted), None


hybrid_attention.register_autograd(_differentiate_hybrid, setup_context=_save_hybrid)


@torch.library.custom_op(f"{_NAMESPACE}::moments", mutates_args=())
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over tokens of x [B, L, N, D] and of x x', [B, N, D] and [B, N, D, D]."""
    with torch.cuda.device_of(x):
        return _module("hybrid_triton").moments(_with_rows(x))


@moments.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    B, _, N, D = x.shape
    shapes = (B, N, D), (B, N, D, D)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save_moments(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_moments(ctx: Any, dmean: Tensor, dproducts: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    # A product of matrices, which is left to PyTorch.
    turned = ((dproducts + dproducts.mT) / x.shape[1]).to(x.dtype)
    return torch.einsum("blnd,bnde->blne", x, turned) + (dmean / x.shape[1]).to(x.dtype)[:, None]


moments.register_autograd(_differentiate_moments, setup_context=_save_moments)


@torch.library.custom_op(f"{_NAMESPACE}::norm_rotary", mutates_args=())
def norm_rotary(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    """Return what `reference.norm_rotary` does, by the fused kernel."""
    with torch.cuda.device_of(x):
        kernels = _module("qk_norm_rope_triton")
        return kernels.forward(_with_rows(x), weight, rotary, num_heads, eps)


@norm_rotary.register_fake
def _(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    B, L, width = x.shape
    return x.new_empty(B, L, num_heads, width // num_heads)


@torch.library.custom_op(f"{_NAMESPACE}::norm_rotary_backward", mutates_args=())
def norm_rotary_backward(
    upstream: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float
) -> Tensor:
    """Return the gradient of x."""
    with torch.cuda.device_of(x):
        kernels = _module("qk_norm_rope_triton")
        return kernels.backward(_with_rows(upstream), _with_rows(x), weight, rotary, eps)


@norm_rotary_backward.register_fake
def _(upstream: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, rotary, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, rotary)


def _differentiate_rotary(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rotary = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = norm_rotary_backward(upstream, x, weight, rotary, ctx.eps)
    if ctx.needs_input_grad[1]:
        # Rare, and a sum over all tokens: left to PyTorch.
        turned_back = rotate(upstream, torch.stack([rotary[0], -rotary[1]])).flatten(2).float()
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=ctx.eps)
        dweight = (turned_back * normed).sum(dim=(0, 1)).to(weight.dtype)
    return dx, dweight, None, None, None


norm_rotary.register_autograd(_differentiate_rotary, setup_context=_save_rotary)
