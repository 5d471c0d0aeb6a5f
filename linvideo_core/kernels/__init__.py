"""The entry to the kernels: validates, chooses a backend, runs it.

Backends never import each other; `reference` defines correctness. The fused kernels are taken where
they have computed a few tokens as the reference does, tried once for each device and shape. Nothing
is tried where PyTorch records what is computed, such as in a CUDA graph or by torch.compile.
"""

import functools
import importlib.util
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import custom_ops, hybrid_reference, reference
from .hybrid_reference import weight_shapes
from .tiles import Tiles

logger = logging.getLogger(__name__)

BACKENDS = ("auto", *custom_ops.BACKENDS)
FEATURE_MAPS = ("hedgehog", "hedgehog_joint")
ATTENTION_MASSES = ("query", "moments")
HEAD_DIMS, FEATURE_RATIOS = (64, 128), (1, 2)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Compiled for gfx1100 with heads of 128, each thread spills 1 to 4 KB of its registers.
_AMD_ARCHITECTURE = "gfx942"
_HYBRID_KERNELS = {f"hybrid_{mass}": mass for mass in ATTENTION_MASSES}
# More tokens than a block has in the larger of two.
_FEW_TILES = Tiles(grid=(1, 1, 200), tile=(1, 1, 129))
# Of a few tokens by the fused kernels, in any dtype: what is right in bf16 is within 0.04.
_MAX_ERROR = 0.1


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
        on a GPU that it can be run on; the log says once what computes, and why not Triton.

    Returns [B, L, N, D] in value's dtype; the gradient reaches all five tensors.
    Raises ValueError naming what does not fit, or why the backend asked for cannot run.
    """
    _check_attention(query, key, value, query_map, key_map)
    if feature_map not in FEATURE_MAPS:
        known = ", ".join(FEATURE_MAPS)
        raise ValueError(f"feature_map {feature_map!r} given; one of {known} is needed")
    D, half = query_map.shape[1:]
    is_joint = feature_map == "hedgehog_joint"
    gradients = _gradients((query, key, value), (query_map, key_map))
    case = ("linear_attention", D, 2 * half, value.dtype, gradients)
    chosen = _choose(
        backend, query.device, _unknown_attention(D, half, value.dtype, is_joint), case
    )
    return custom_ops.linear_attention(query, key, value, query_map, key_map, chosen, is_joint)[0]


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    weights: Mapping[str, Tensor],
    tiles: Tiles,
    attention_mass: str,
    *,
    backend: str = "auto",
) -> Tensor:
    """Softmax within tiles beside linear attention, `s local + (1 - s) far` of `hybrid_reference`.

    query, key, value: [B, L, N, D], as `linear_attention` takes them, L the tokens of `tiles`.
    query_map, key_map: [N, D, M/2]; weights: by the names of `hybrid_reference.weight_shapes`.
    attention_mass: the estimate of what lies beyond a tile, "query" or "moments".
    backend: as of `linear_attention`; the fused kernels know M <= 128, and "auto" leaves more to
        the reference.

    Returns [B, L, N, D] in value's dtype; the gradient reaches all tensors.
    Raises ValueError naming what does not fit, or why the backend asked for cannot run.
    """
    _check_attention(query, key, value, query_map, key_map)
    N, D, half = query_map.shape
    tiles.check_tokens(query, key, value)
    _check_weights(weights, weight_shapes(attention_mass, N, D), query.device)
    gradients = _gradients((query, key, value, *weights.values()), (query_map, key_map))
    case = (f"hybrid_{attention_mass}", D, 2 * half, value.dtype, gradients)
    unknown = _unknown_hybrid(D, half, value.dtype)
    chosen = _choose(backend, query.device, unknown, case)
    tensors = (query, key, value, query_map, key_map)
    return _attend_in_tiles(chosen, tensors, weights, tiles, attention_mass)


def _attend_in_tiles(
    backend: str,
    tensors: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    tiles: Tiles,
    attention_mass: str,
) -> Tensor:
    if backend == "reference":
        return hybrid_reference.hybrid_attention(*tensors, weights, tiles, attention_mass)
    _, key, value, *_ = tensors
    level, slope, spread = hybrid_reference.estimate_mass(
        weights, attention_mass, tiles, key.to(value.dtype), _find_moments
    )
    if tiles.num_tiles == 1:
        # Where no key lies outside, all is the tile's.
        level = level - math.inf
    return custom_ops.hybrid_attention(*tensors, level, slope, spread, tiles.numbers)[0]


def _find_moments(key: Tensor) -> tuple[Tensor, Tensor]:
    mean, products = custom_ops.moments(key)
    return mean, products - mean.unsqueeze(-1) * mean.unsqueeze(-2)


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
    case = ("norm_rotary", D, D, x.dtype, _gradients((x,)))
    if _choose(backend, x.device, _unknown_rotary(D, x.dtype), case) == "reference":
        return reference.norm_rotary(x, weight, rotary, num_heads, eps)
    return custom_ops.norm_rotary(x, weight, rotary, num_heads, eps)


def is_norm_rotary_fused(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether `norm_rotary` with backend "auto" runs as one kernel there."""
    case = ("norm_rotary", head_dim, head_dim, dtype, "")
    return _choose("auto", device, _unknown_rotary(head_dim, dtype), case) == "triton"


def why_not_fused(
    device: torch.device,
    head_dim: int,
    num_features: int,
    dtype: torch.dtype,
    *,
    feature_map: str = "hedgehog",
    attention_mass: str = "",
) -> str:
    """Return why `linear_attention` with backend "auto" leaves the fused kernels there, or "".

    head_dim, num_features: D and M; dtype: value's.
    attention_mass: that of `hybrid_attention` in its place.
    """
    half, is_joint = num_features // 2, feature_map == "hedgehog_joint"
    kernel, unknown = "linear_attention", _unknown_attention(head_dim, half, dtype, is_joint)
    if attention_mass:
        kernel, unknown = f"hybrid_{attention_mass}", _unknown_hybrid(head_dim, half, dtype)
    case = (kernel, head_dim, num_features, dtype, "")
    return _why_not_triton(device, unknown, case, is_compiling=False)


# With 256 an H200's output was .036 off (D = 128, bf16, Triton 3.6), and not in the interpreter.
_MOST_HYBRID_FEATURES = 128

# Kernel, D, M, dtype, and what has gradients: "", "tokens" or "maps" and tokens.
_Case = tuple[str, int, int, torch.dtype, str]


def _gradients(tokens: tuple[Tensor, ...], maps: tuple[Tensor, ...] = ()) -> str:
    if torch.is_grad_enabled():
        for name, tensors in (("maps", maps), ("tokens", tokens)):
            if any(x.requires_grad for x in tensors):
                return name
    return ""


def _choose(backend: str, device: torch.device, unknown: str, case: _Case) -> str:
    return _choose_constant(backend, device, unknown, case, torch.compiler.is_compiling())


@torch.compiler.assume_constant_result
def _choose_constant(
    backend: str, device: torch.device, unknown: str, case: _Case, is_compiling: bool
) -> str:
    """Return a backend that runs; unknown: what the kernels do not know of a shape, "" if all."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} given; one of {', '.join(BACKENDS)} is needed")
    # On a CPU, Triton's interpreter, where it is switched on, is for tests.
    if backend == "reference" or (backend == "auto" and device.type in ("cpu", "meta")):
        return "reference"
    reason = _why_not_triton(device, unknown, case, is_compiling)
    if backend == "triton" and reason:
        raise ValueError(
            f"backend 'triton' given, but {reason}: use 'auto' or 'reference', which run everywhere"
        )
    _log_once(device, reason)
    return "reference" if reason else "triton"


@functools.cache
def _log_once(device: torch.device, reason: str) -> None:
    if reason:
        logger.warning(
            "LinVideo: linear attention on %s is computed by plain PyTorch, which takes longer: %s",
            device,
            reason,
        )
    else:
        logger.info("LinVideo: linear attention on %s is computed by fused kernels", device)


# Why the fused kernels failed when they were tried, "" where they did not.
_tried: dict[tuple[torch.device, _Case], str] = {}


def _why_not_triton(device: torch.device, unknown: str, case: _Case, is_compiling: bool) -> str:
    """Return why no fused kernel can run here, "" where they can or cannot be tried now."""
    if reason := _refuse_device_once(device) or unknown or _refuse_wide(device, case):
        return reason
    key = device, case
    if key not in _tried:
        if is_compiling or _is_recorded(device):
            return ""
        _tried[key] = _try_kernels(device, case)
    return _tried[key]


def _is_recorded(device: torch.device) -> bool:
    """Return whether what is computed now becomes part of a CUDA graph, or is seen by a mode.

    Such a mode stands fake tensors in for real ones, counts, or keeps what a checkpoint needs.
    """
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return is_captured or _get_current_dispatch_mode() is not None


def refuse_device(device: torch.device) -> str:
    """Return why no fused kernel runs on a device, whatever it is given, or ""."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the fused kernels are for NVIDIA's and AMD's GPUs, not for {device.type}"
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        where = ", which PyTorch for ROCm comes with" if torch.version.hip else ""
        return f"Triton is not installed{where or f' (pip install {package})'}"
    return _refuse_card(device) if device.type == "cuda" else ""


# Asked at every call of a layer; what a command asks may have changed since.
_refuse_device_once = functools.cache(refuse_device)


def _refuse_card(device: torch.device) -> str:
    if not torch.cuda.is_available():
        # As where fake tensors plan for another machine.
        return "PyTorch finds no GPU"
    if torch.version.hip:
        # As "gfx942:sramecc+:xnack-".
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if architecture != _AMD_ARCHITECTURE:
            return f"of AMD's GPUs the fused kernels know {_AMD_ARCHITECTURE}, not {architecture}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the fused kernels can use"
    return ""


def _refuse_wide(device: torch.device, case: _Case) -> str:
    """Return why a card without Hopper's tensor cores cannot hold so many features, "" if it can.

    An RTX has 99 KB of shared memory, of which they take 104 and more. An A100 has enough, but its
    threads would spill 14 KB of registers each where the maps learn.
    """
    _, D, M, dtype, gradients = case
    if device.type != "cuda" or M == D or (D == 64 and dtype != torch.float32):
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (8, 12) and (capability != (8, 0) or gradients == "maps"):
        name, form = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
        return f"{name} has no room for {M} features at head dim {D} in {form}"
    return ""


def _try_kernels(device: torch.device, case: _Case) -> str:
    """Compute a few tokens in each way; return why the fused kernels failed, "" if they did not."""
    try:
        found, expected = (_compute_few(name, device, *case) for name in custom_ops.BACKENDS)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0]}"
        if isinstance(error, OSError | subprocess.CalledProcessError) or "C compiler" in said:
            return (
                f"Triton cannot compile ({said}); it needs a C compiler and Python's headers, such "
                "as apt install gcc python3-dev brings, and a folder to write to (TRITON_CACHE_DIR)"
            )
        return f"Triton fails ({said})"
    errors = ((x - y).norm() / y.norm() for x, y in zip(found, expected, strict=True))
    is_right = all(error < _MAX_ERROR for error in errors)
    return "" if is_right else "the fused kernels give wrong numbers with this GPU and Triton"


def _compute_few(
    backend: str,
    device: torch.device,
    kernel: str,
    D: int,
    M: int,
    dtype: torch.dtype,
    gradients: str,
) -> list[Tensor]:
    """Return what a kernel gives for a few tokens, then the gradients asked for, all in fp32."""
    N = 2
    is_rotary, is_hybrid = kernel == "norm_rotary", kernel in _HYBRID_KERNELS
    L = _FEW_TILES.num_tokens if is_hybrid else 17
    shapes = [(1, L, N * D)] if is_rotary else [(1, L, N, D)] * 3
    num_tokens = len(shapes)
    shapes += [(N * D,), (2, L, D // 2)] if is_rotary else [(N, D, M // 2)] * 2
    if is_hybrid:
        shapes += weight_shapes(_HYBRID_KERNELS[kernel], N, D).values()
    autocast = torch.autocast(device.type, enabled=False)
    # Hooks that change nothing hide what is saved from those of the caller's checkpoint.
    hidden = saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), autocast, hidden:
        inputs = [_make_numbers(shape, device) for shape in shapes]
        inputs = [x.to(dtype) if i < num_tokens else x / D**0.5 for i, x in enumerate(inputs)]
        last = {"": 0, "tokens": num_tokens, "maps": len(inputs)}[gradients]
        # One number a head, as mass_bias has, may have a gradient that is nothing but rounding.
        wanted = [x for x in inputs[:last] if x.ndim > 1]
        for x in wanted:
            x.requires_grad_()
        out = _call_kernel(kernel, backend, inputs, N)
        found = torch.autograd.grad(out.float().square().sum(), wanted) if wanted else ()
        return [x.detach().float() for x in (out, *found)]


def _call_kernel(kernel: str, backend: str, inputs: list[Tensor], num_heads: int) -> Tensor:
    if kernel == "linear_attention":
        return custom_ops.linear_attention(*inputs, backend)[0]
    if kernel == "norm_rotary":
        module = custom_ops if backend == "triton" else reference
        return module.norm_rotary(*inputs, num_heads, 1e-6)
    attention_mass = _HYBRID_KERNELS[kernel]
    names = weight_shapes(attention_mass, num_heads, inputs[0].shape[3])
    weights = dict(zip(names, inputs[5:], strict=True))
    return _attend_in_tiles(backend, inputs[:5], weights, _FEW_TILES, attention_mass)


def _make_numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers from -1 to 1 without order, drawn by no generator: the seed is the user's."""
    numbers = torch.arange(math.prod(shape), device=device)
    return (numbers * numbers % 1009 / 504.5 - 1).view(shape)


def _unknown_attention(D: int, half: int, dtype: torch.dtype, is_joint: bool) -> str:
    if is_joint:
        return "the fused kernels know the feature map 'hedgehog' alone"
    if D not in HEAD_DIMS or 2 * half not in [ratio * D for ratio in FEATURE_RATIOS]:
        return f"the fused kernels know head dims {HEAD_DIMS} and as many or twice as many features"
    # In fp32 the products' parts of wider heads exceed the shared memory of every card.
    if dtype == torch.float64 or (dtype == torch.float32 and D > 64):
        return f"the fused kernels know no {str(dtype).removeprefix('torch.')} at head dim {D}"
    return ""


def _unknown_hybrid(D: int, half: int, dtype: torch.dtype) -> str:
    if 2 * half > _MOST_HYBRID_FEATURES:
        return f"the fused kernels know hybrid layers of {_MOST_HYBRID_FEATURES} features at most"
    return _unknown_attention(D, half, dtype, is_joint=False)


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


def _check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, list[int]], device: torch.device
) -> None:
    for name, shape in expected.items():
        given = weights.get(name)
        if given is None or list(given.shape) != shape or given.device != device:
            found = {known: (list(x.shape), str(x.device)) for known, x in weights.items()}
            raise ValueError(f"weights {found} given; {name} {shape} on {device} is needed")
