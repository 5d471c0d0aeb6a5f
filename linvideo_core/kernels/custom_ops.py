"""Linear attention as PyTorch custom operators, with a closed-form gradient.

Opaque to the compiler, it runs under torch.compile without a graph break, in CUDA graphs, under
autocast and activation checkpointing, whichever backend computes it.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = {"triton": "triton_launch", "reference": "reference"}


def load_backend(backend: str) -> ModuleType:
    """Import a backend's module, which has `forward` and `backward`."""
    return importlib.import_module(f".{BACKENDS[backend]}", __package__)


def _name_map(is_joint: bool) -> dict[str, bool]:
    """Return what tells a backend of a joint map: only one that knows it is asked."""
    return {"is_joint": True} if is_joint else {}


@torch.library.custom_op("linvideo::linear_attention", mutates_args=())
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
    rows = (with_rows(x) for x in (query, key, value))
    return load_backend(backend).forward(*rows, query_map, key_map, **_name_map(is_joint))


@linear_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    backend: str,
    is_joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, N, D = query.shape
    M = 2 * query_map.shape[2]
    is_half = backend == "triton" and value.dtype != torch.float32
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    means = value.new_empty(B, N, M, D, dtype=torch.bfloat16 if is_half else wide)
    normaliser = value.new_empty(B, N, M, dtype=wide)
    return value.new_empty(query.shape), means, normaliser


@torch.library.custom_op("linvideo::linear_attention_backward", mutates_args=())
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
    upstream, query, key, value = (with_rows(x) for x in (upstream, query, key, value))
    *gradients, dquery_map, dkey_map = load_backend(backend).backward(
        upstream, query, key, value, query_map, key_map, means, normaliser,
        needs_map_gradients=needs_map_gradients, **_name_map(is_joint),
    )  # fmt: skip
    return *gradients, dquery_map.to(query_map.dtype), dkey_map.to(key_map.dtype)


@linear_attention_backward.register_fake
def _(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (query, key, value, query_map, key_map)
    return tuple(x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend, ctx.is_joint = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 7
    needs_map_gradients = any(ctx.needs_input_grad[3:5])
    gradients = linear_attention_backward(
        upstream, *ctx.saved_tensors, ctx.backend, needs_map_gradients, ctx.is_joint
    )
    wanted = zip(gradients, ctx.needs_input_grad[:5], strict=True)
    return *(gradient if is_wanted else None for gradient, is_wanted in wanted), None, None


linear_attention.register_autograd(_differentiate, setup_context=_setup_context)


def with_rows(x: Tensor) -> Tensor:
    """Return x with its last axis contiguous, which is how models hold it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
