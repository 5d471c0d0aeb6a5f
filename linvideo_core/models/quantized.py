"""Frozen weights held in fewer bytes: bf16, or fp8 for the linear layers of the blocks.

All else (embeddings, norms, modulations, head) is bf16 in both.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_FP8 = torch.float8_e4m3fn
_SCALE_BYTES = 4


class Float8Linear(nn.Linear):
    """A frozen linear layer whose weight is fp8 (e4m3), made wide again whenever it is used.

    weight: [out, in]; times `scale` [out, 1] fp32 it is the layer's weight. Our own scale is a
    power of two, so that the product is exact in bf16, and brings the largest value a row near
    fp8's own.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        """weight [out, in] and bias [out] in any dtype; the bias is kept in bf16.

        scale: [out, 1] or [1, 1] fp32 of a weight that is fp8 already, which is kept as it is.
        """
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        weight = weight.detach()
        if scale is None:
            largest = weight.float().abs().amax(dim=1, keepdim=True)
            exponent = torch.frexp(largest / torch.finfo(_FP8).max).exponent
            scale = torch.ldexp(torch.ones_like(largest), exponent)
            weight = (weight.float() / scale).to(_FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.bfloat16(), requires_grad=False)
        self.register_buffer("scale", scale.expand(rows, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; the gradient reaches x alone."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _FrozenProduct.apply(x.to(dtype), self.weight, self.scale, bias)


class _FrozenProduct(torch.autograd.Function):
    """A linear layer that keeps its narrow weight for backward, where F.linear keeps a wide one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _widen(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream @ _widen(*ctx.saved_tensors, upstream.dtype), None, None, None


def place(
    model: nn.Module, name: str, value: Tensor, frozen: str, scale: Tensor | None = None
) -> None:
    """Put a tensor into a model as the parameter `name`, as `frozen` holds it.

    scale: [1, 1] or [out, 1] fp32, of fp8 values; where fp8 is held, both stay as they are.

    A linear layer of a block is replaced as soon as its weight is placed; its bias may come before
    or after.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    is_held = frozen == "fp8" and is_narrow(name, tuple(value.shape))
    if scale is not None and not (is_held and value.dtype == _FP8):
        value, scale = value.float() * scale, None
    if is_held:
        bias = owner.bias
        owner = Float8Linear(value, None, scale)
        owner.register_parameter("bias", bias)
        model.set_submodule(owner_name, owner)
    else:
        setattr(owner, leaf, nn.Parameter(value.to(_DTYPES[frozen])))


def count_frozen_bytes(shapes: Mapping[str, tuple[int, ...]], frozen: str, prefix: str = "") -> int:
    """Return the bytes of the parameters under a prefix, as `frozen` holds them."""
    total = 0
    for name, shape in shapes.items():
        if not name.startswith(prefix):
            continue
        if frozen == "fp8" and is_narrow(name, shape):
            total += math.prod(shape) + _SCALE_BYTES * shape[0]
        else:
            total += math.prod(shape) * _DTYPES[frozen].itemsize
    return total


def is_narrow(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a parameter is one of those that fp8 holds: the matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def _widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Rounded once: a scale of bf16's 8 bits would be off for all weights of its row alike.
    return torch.mul(weight.to(dtype), scale, out=torch.empty_like(weight, dtype=dtype))
