"""Softmax attention by a kernel of one's choice: PyTorch's own ones, or Sol-Attn's sparse one.

Sol-Attn (arXiv 2607.24027) needs no training. Each block of 64 queries attends to the blocks of
keys that matter most to it exactly; every other block stands in as one pooled term, so that nothing
leaves the softmax. The optional package comfy-kitchen computes it.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SPARSE = "sparse"
SOFTMAX_KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    SPARSE: None,
}
"""Name -> PyTorch's kernel of softmax attention; by default PyTorch chooses one."""
DENSITY = 0.1
"""The share of key blocks that sparse attention computes exactly unless another is given."""
SPARSE_PACKAGE = "comfy-kitchen>=0.2.40"
SPARSE_BLOCK, SPARSE_HEAD_DIM = 64, 128

_NUM_TRIED = 64
# Of queries, each computed by a thread block: about ten rounds of what an H200 computes at once.
_BUSY_BLOCKS = 3072

# How PyTorch says that the one kernel it may use cannot compute these tensors.
_REFUSALS = ("No available kernel", "No viable backend", "cuDNN Frontend error")


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: str = "default", density: float = DENSITY
) -> Tensor:
    """Attend over all keys, scaled by 1/sqrt(D); query, key, value and the result are [B, L, N, D].

    kernel: of SOFTMAX_KERNELS.
    density: of `sparse_attention`; other kernels are dense.

    Raises ValueError, in one sentence, where that kernel cannot compute these tensors.
    """
    if kernel == SPARSE:
        return sparse_attention(query, key, value, density)
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    if SOFTMAX_KERNELS[kernel] is None:
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    try:
        with sdpa_kernel(SOFTMAX_KERNELS[kernel]):
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    except RuntimeError as error:
        if not str(error).startswith(_REFUSALS):
            raise
        raise ValueError(
            f"PyTorch's {kernel} attention cannot compute {_name(query.dtype)} with head dim "
            f"{query.shape[-1]} on {query.device}; choose another attention backend"
        ) from error


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: float = DENSITY,
    *,
    backend: str = "auto",
    sink_blocks: tuple[int, int] = (0, 0),
    sink_q: tuple[int, int] = (0, 0),
) -> Tensor:
    """Attend as Sol-Attn does: the best key blocks exactly, all others as pooled terms.

    query, key, value: [B, L, N, D] of as many tokens each, in one dtype; blocks are 64 tokens that
        follow one another.
    density: share of the key blocks that a query block attends to exactly, above 0; at 1 attention
        is dense. A block and its two neighbours are exact at any density.
    backend: "auto": on a GPU a kernel that computes in 8 bits and has no gradient, on a CPU the
        reference; "reference": comfy-kitchen's plain PyTorch, which holds all L x L scores.
    sink_blocks: first block and the one behind the last, of keys that every query attends to
        exactly, beyond the density.
    sink_q: the same of queries that attend to all keys exactly.

    Returns [B, L, N, D]; by the reference the gradient reaches all three tensors.
    Raises ValueError, in one sentence, for what cannot be computed.
    """
    check_density(density)
    is_reference = backend == "reference" or query.device.type == "cpu"
    device = torch.device("cpu") if is_reference else query.device
    if reason := why_not_sparse(device, query.shape[-1], query.dtype):
        raise ValueError(f"sparse attention cannot be computed here: {reason}")
    if not query.shape == key.shape == value.shape or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"sparse attention takes query, key and value of one shape and dtype; "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)} given, in "
            f"{', '.join(_name(x.dtype) for x in (query, key, value))}"
        )
    if density == 1:
        sink_blocks, density = (0, -(-query.shape[1] // SPARSE_BLOCK)), 0.5
    settings = {"topk_ratio": density, "sink_blocks": list(sink_blocks), "sink_q": list(sink_q)}
    if is_reference:
        return _attend_by_reference(query, key, value, **settings)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "sparse attention has no gradient on a GPU: train with another softmax kernel"
        )
    from comfy_kitchen import sol_attn

    attend = functools.partial(sol_attn, **settings)
    return attend_in_parts(attend, query, key, value)


def attend_in_parts(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    min_blocks: int = _BUSY_BLOCKS,
) -> Tensor:
    """Attend sample by sample and a few heads at a time, so that a kernel needs less memory.

    Sol-Attn's holds all that it is given in 8 bits besides: 330 MiB of a guided Wan 1.3B at 480p,
    2.6 GiB of a 14B at 720p. Samples and heads do not depend on each other.

    query, key, value, and what `attend` makes of parts of them: [B, L, N, D].
    min_blocks: of queries that a part has at least, where a sample has as many: 64 tokens of a head
        are one.
    """
    B, L, N, _ = query.shape
    fewest_heads = -(-min_blocks // -(-L // SPARSE_BLOCK))
    groups = max(1, N // fewest_heads)
    if B * groups == 1:
        return attend(query, key, value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for sample, group in itertools.product(range(B), range(groups)):
        heads = slice(group * N // groups, (group + 1) * N // groups)
        part = (slice(sample, sample + 1), slice(None), heads)
        out[part] = attend(*(x[part] for x in (query, key, value)))
    return out


# PyTorch 2.13 compiles its `scatter_add_` into one that reads beyond the index.
@torch.compiler.disable
def _attend_by_reference(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    return sol_attn(query, key, value, **settings)


def check_density(density: float) -> None:
    """Raise ValueError for what is no density of sparse attention."""
    if not 0 < density <= 1:
        raise ValueError(f"density {density} given; a share above 0, and at most 1, is needed")


def why_not(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """Return why a kernel of SOFTMAX_KERNELS cannot compute attention there, or "".

    One of PyTorch's is tried on a few tokens, which have a gradient where gradients are enabled.
    """
    if kernel == SPARSE:
        reason = why_not_sparse(device, head_dim, dtype)
        return f"sparse attention cannot be computed here: {reason}" if reason else ""
    if SOFTMAX_KERNELS[kernel] is None:
        return ""
    tokens = torch.zeros(1, _NUM_TRIED, 1, head_dim, device=device, dtype=dtype)
    tokens.requires_grad_(torch.is_grad_enabled())
    try:
        softmax_attention(tokens, tokens, tokens, kernel)
    except ValueError as error:
        return str(error)
    return ""


@torch.compiler.assume_constant_result
def why_not_sparse(device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """Return why `sparse_attention` cannot be computed there, or ""."""
    if reason := _refuse_package():
        return reason
    if device.type == "cpu":
        return ""
    from comfy_kitchen import sol_attn_is_available

    if not sol_attn_is_available(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"comfy-kitchen has no kernel of it for {name}"
    if head_dim != SPARSE_HEAD_DIM or dtype not in (torch.float16, torch.bfloat16):
        return (
            f"comfy-kitchen's kernel takes fp16 or bf16 and head dim {SPARSE_HEAD_DIM}, not "
            f"{_name(dtype)} with head dim {head_dim}"
        )
    return ""


@functools.cache
def _refuse_package() -> str:
    """Return why comfy-kitchen cannot be used, "" where it can."""
    install = f"pip install '{SPARSE_PACKAGE}'"
    if importlib.util.find_spec("comfy_kitchen") is None:
        return f"the package comfy-kitchen is not installed ({install})"
    import comfy_kitchen

    # Earlier versions route by a threshold alone, or do not have it.
    attend = getattr(comfy_kitchen, "sol_attn", None)
    if attend is None or "topk_ratio" not in inspect.signature(attend).parameters:
        return f"the installed comfy-kitchen is too old for it ({install})"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
