"""The entry to the kernels: validates, chooses a backend, runs it.

Backends never import each other; `reference` defines correctness.
"""

import functools
import importlib.util
import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import custom_ops, reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", *custom_ops.BACKENDS)
FEATURE_MAPS = ("hedgehog", "hedgehog_joint")
HEAD_DIMS, FEATURE_RATIOS = (64, 128), (1, 2)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SOFTMAX_KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Name -> PyTorch's kernel of softmax attention; by default PyTorch chooses one."""

# How PyTorch says that the one kernel it may use cannot compute these tensors.
_REFUSALS = ("No available kernel", "No viable backend")


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
    _check_attention(query, key, value, query_map, key_map)
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
    """Normalise tokens over their whole width, split heads, rotate pairs: Wan's queries and keys.

    x: [B, L, N D], a projection's output. weight: [N D], of the RMS norm.
    rotary: [2, L, D/2] fp32, cos and sin of every token's angles. Any strides; no copy is made.

    Returns [B, L, N, D] in x's dtype; the gradient reaches x and weight.
    Raises ValueError naming what does not fit, or why the backend asked for cannot run.
    """
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
    if _choose(backend, x.device, _unknown_rotary(D, x.dtype)) == "reference":
        return reference.norm_rotary(x, weight, rotary, num_heads, eps)
    return custom_ops.norm_rotary(x, weight, rotary, num_heads, eps)


def is_norm_rotary_fused(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether `norm_rotary` with backend "auto" runs as one kernel there."""
    return _choose("auto", device, _unknown_rotary(head_dim, dtype)) == "triton"


def why_not_fused(
    device: torch.device,
    head_dim: int,
    num_features: int,
    dtype: torch.dtype,
    *,
    feature_map: str = "hedgehog",
) -> str:
    """Return why `linear_attention` with backend "auto" leaves the fused kernels there, or "".

    head_dim, num_features: D and M; dtype: value's.
    """
    unknown = _unknown_attention(head_dim, num_features, dtype)
    if feature_map == "hedgehog_joint":
        unknown = "the fused kernels know the feature map 'hedgehog' alone"
    if _choose("auto", device, unknown) == "triton":
        return ""
    return _why_not_triton(device) or unknown or f"the fused kernels are not tried on {device.type}"


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str = "default") -> Tensor:
    """Attend over all keys, scaled by 1/sqrt(D); query, key, value and the result are [B, L, N, D].

    kernel: of SOFTMAX_KERNELS.

    Raises ValueError, in one sentence, where that kernel cannot compute these tensors.
    """
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    if SOFTMAX_KERNELS[kernel] is None:
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    try:
        with sdpa_kernel(SOFTMAX_KERNELS[kernel]):
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    except RuntimeError as error:
        if not str(error).startswith(_REFUSALS):
            raise
        dtype = str(query.dtype).removeprefix("torch.")
        raise ValueError(
            f"PyTorch's {kernel} attention cannot compute {dtype} with head dim "
            f"{query.shape[-1]} on {query.device}; choose another attention backend"
        ) from error


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


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> None:
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
        if tensor.ndim != 3 or tensor.shape[:2] != (N, D) or tensor.shape != query_map.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; [{N}, {D}, M/2] is expected, both maps "
                "alike: they must come from a file for this model"
            )
    tensors = (query, key, value, query_map, key_map)
    if any(0 in tensor.shape for tensor in tensors):
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
