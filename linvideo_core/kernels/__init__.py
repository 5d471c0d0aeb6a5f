"""The one door to the kernels: validates, chooses a backend, runs it.

Backends never import each other; `reference` defines correctness.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from . import custom_ops
from . import qk_norm_rope as rotary_operator
from .softmax import softmax_attention

__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "FEATURE_RATIOS",
    "HEAD_DIMS",
    "is_norm_rotary_fused",
    "linear_attention",
    "norm_rotary",
    "softmax_attention",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", *custom_ops.BACKENDS)
FEATURE_MAPS = ("hedgehog", "hedgehog_joint")
HEAD_DIMS, FEATURE_RATIOS = (64, 128), (1, 2)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *,
    feature_map: str = "hedgehog",
    backend: str = "auto",
) -> Tensor:
    """Non-causal linear attention with a Hedgehog map (LinVideo eq. 3 and 4).

    query, key, value: [B, L, N, D], roped and normed as softmax attention takes them; key and
        value may have another L than query. Any strides; no copy where the last one is 1.
    query_map, key_map: [N, D, M/2], the learnable W of each side; heads may share one (expanded).
    feature_map: "hedgehog", softmax(x W) ++ softmax(-x W), or "hedgehog_joint", one softmax over
        all M features of x W ++ -x W, which the reference alone computes.
    backend: "triton" (fused kernels), "reference" (plain PyTorch), or "auto", which takes Triton
        on an NVIDIA GPU that can run it and says so once in the log.

    Returns [B, L, N, D] in value's dtype; the gradient reaches all five tensors.
    Raises ValueError naming what does not fit, or why the backend asked for cannot run.
    """
    _check(query, key, value, query_map, key_map)
    if feature_map not in FEATURE_MAPS:
        known = ", ".join(FEATURE_MAPS)
        raise ValueError(f"feature_map {feature_map!r} given; one of {known} is needed")
    D, half = query_map.shape[1:]
    is_joint = feature_map == "hedgehog_joint"
    unknown = _unknown_attention(D, 2 * half, value.dtype)
    if is_joint:
        unknown = "the fused kernels know the feature map 'hedgehog' alone"
    chosen = _choose(backend, query.device, unknown)
    return custom_ops.linear_attention(query, key, value, query_map, key_map, chosen, is_joint)[0]


def norm_rotary(
    x: Tensor,
    weight: Tensor,
    rotary: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalise tokens over their whole width, split heads, rotate pairs: Wan's way to q and k.

    x: [B, L, N D], a projection's output. weight: [N D], of the RMS norm.
    rotary: [2, L, D/2] fp32, cos and sin of every token's angles. Any strides; no copy is made.

    Returns [B, L, N, D] in x's dtype; the gradient reaches x and weight.
    Raises ValueError naming what does not fit, or why the backend asked for cannot run.
    """
    D = _check_norm_rotary(x, weight, rotary, num_heads)
    if _choose(backend, x.device, _unknown_rotary(D, x.dtype)) == "reference":
        return rotary_operator.reference(x, weight, rotary, num_heads, eps)
    return rotary_operator.fused(x, weight, rotary, num_heads, eps)


def is_norm_rotary_fused(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether `norm_rotary` runs as one kernel there, left to choose."""
    return _choose("auto", device, _unknown_rotary(head_dim, dtype)) == "triton"


def _check_norm_rotary(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int) -> int:
    """Return D."""
    if x.ndim != 3 or x.shape[2] % (2 * num_heads) or 0 in x.shape:
        raise ValueError(
            f"x has shape {list(x.shape)}; [B, L, {num_heads} D] with even D is expected"
        )
    _, L, width = x.shape
    D = width // num_heads
    if weight.shape != (width,) or rotary.shape != (2, L, D // 2):
        raise ValueError(
            f"weight {list(weight.shape)} and rotary {list(rotary.shape)} given; [{width}] and "
            f"[2, {L}, {D // 2}] are expected"
        )
    return D


@torch.compiler.assume_constant_result
def _choose(backend: str, device: torch.device, unknown: str) -> str:
    return _choose_once(backend, device, unknown)


@functools.cache
def _choose_once(backend: str, device: torch.device, unknown: str) -> str:
    """Return a backend that runs; unknown: what the kernels do not know of a shape, "" if all."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} given; one of {', '.join(BACKENDS)} is needed")
    if backend == "reference":
        return backend
    reason = _why_not_triton(device) or unknown
    if backend == "triton" and reason:
        raise ValueError(
            f"backend 'triton' given, but {reason}: use 'auto' or 'reference', which run everywhere"
        )
    if backend == "auto" and not reason and (device.type != "cuda" or torch.version.hip):
        reason = f"the fused kernels are not tried on {'AMD' if torch.version.hip else device.type}"
    chosen = "reference" if reason else "triton"
    logger.info(
        "linear attention on %s: %s", device, f"{chosen}, as {reason}" if reason else chosen
    )
    return chosen


def _why_not_triton(device: torch.device) -> str:
    """Return why no fused kernel can run here, "" where they can."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not is_interpreted:
        return f"Triton cannot run on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the fused kernels can use"
    return ""


def _unknown_attention(D: int, M: int, dtype: torch.dtype) -> str:
    if D not in HEAD_DIMS or M not in [ratio * D for ratio in FEATURE_RATIOS]:
        return f"the fused kernels know head dims {HEAD_DIMS} and as many or twice as many features"
    # In fp32 the products' parts of wider heads exceed the shared memory of every card.
    if dtype == torch.float64 or (dtype == torch.float32 and D > 64):
        return f"the fused kernels know no {str(dtype).removeprefix('torch.')} at head dim {D}"
    return ""


def _unknown_rotary(D: int, dtype: torch.dtype) -> str:
    if D not in HEAD_DIMS or dtype == torch.float64:
        return f"the fused kernels know head dims {HEAD_DIMS} and no float64"
    return ""


def _check(query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor) -> None:
    if query.ndim != 4:
        raise ValueError(f"query has shape {list(query.shape)}; [B, L, N, D] is expected")
    B, _, N, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[0] != B or tensor.shape[2:] != (N, D):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; [{B}, L, {N}, {D}] is expected, as query's"
            )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} tokens and value {value.shape[1]}; as many of each"
        )
    for name, tensor in (("query_map", query_map), ("key_map", key_map)):
        if tensor.ndim != 3 or tensor.shape[:2] != (N, D):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; [{N}, {D}, M/2] is expected: the feature "
                "maps must come from a file for this model"
            )
    if query_map.shape != key_map.shape:
        raise ValueError(
            f"query_map {list(query_map.shape)} and key_map {list(key_map.shape)} must be alike"
        )
    tensors = (query, key, value, query_map, key_map)
    if 0 in query.shape or 0 in key.shape or 0 in query_map.shape:
        raise ValueError("query, key or the feature maps are empty; at least one token is needed")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices: {sorted(map(str, devices))}; use one")
    if any(t.dtype not in _DTYPES for t in tensors) or query.dtype != key.dtype:
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors)
        raise ValueError(
            f"query, key, value and the maps hold {dtypes}; fp16, bf16 or fp32 is needed, query "
            "and key alike"
        )
