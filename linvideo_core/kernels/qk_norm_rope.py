"""qk-norm and rotary embedding in one pass, as Wan has them between projection and attention.

Eager, they are five passes over queries and keys, which next to linear attention is much. Here is
the definition in plain PyTorch, and the operator around the fused kernels of `qk_norm_rope_triton`.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .custom_ops import with_rows


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, L, N, D] by `rotary` [2, L, D/2], cos and sin."""
    cos, sin = rotary[:, None, :, None].unbind(0)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def reference(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    """Return what `kernels.norm_rotary` defines, differentiable."""
    normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return rotate(rearrange(normed, "b l (n d) -> b l n d", n=num_heads), rotary)


@torch.library.custom_op("linvideo::norm_rotary", mutates_args=())
def fused(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    """Return the same by the fused kernel."""
    return _kernels().forward(with_rows(x), weight, rotary, num_heads, eps)


@fused.register_fake
def _(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    B, L, width = x.shape
    return x.new_empty(B, L, num_heads, width // num_heads)


@torch.library.custom_op("linvideo::norm_rotary_backward", mutates_args=())
def fused_backward(
    upstream: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float
) -> Tensor:
    """Return the gradient of x."""
    return _kernels().backward(with_rows(upstream), with_rows(x), weight, rotary, eps)


@fused_backward.register_fake
def _(upstream: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, rotary, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, rotary)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rotary = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = fused_backward(upstream, x, weight, rotary, ctx.eps)
    if ctx.needs_input_grad[1]:
        # Rare, and a sum over all tokens: left to PyTorch.
        turned_back = rotate(upstream, torch.stack([rotary[0], -rotary[1]])).flatten(2).float()
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=ctx.eps)
        dweight = (turned_back * normed).sum(dim=(0, 1)).to(weight.dtype)
    return dx, dweight, None, None, None


fused.register_autograd(_differentiate, setup_context=_setup_context)


def _kernels() -> Any:
    return importlib.import_module(".qk_norm_rope_triton", __package__)
