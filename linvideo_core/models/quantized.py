"""Frozen weights held in fewer bytes: bf16, or fp8 for the linear layers of the blocks.

All else (embeddings, norms, modulations, head) is bf16 in both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..run.config import option
from ..run.errors import SettingError

FROZEN = ("fp32", "bf16", "fp8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_FP8 = torch.float8_e4m3fn
_SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """How the weights that are not trained are held, for a custom --model."""

    frozen: str = option(
        "fp32", "frozen weights, also the teacher's: fp8 holds the blocks' matrices", choices=FROZEN
    )
    offload_blocks: int = option(
        0, "blocks whose frozen weights wait in CPU memory until they are computed"
    )

    def __post_init__(self) -> None:
        if self.offload_blocks < 0:
            raise SettingError(
                f"{{offload_blocks}} {self.offload_blocks} given; 0 or more blocks are needed",
                "offload_blocks",
            )

    @property
    def given(self) -> str:
        """Return the flags that are not as usual, as a sentence names them; "" for none."""
        flags = [f"--frozen {self.frozen}"] if self.frozen != "fp32" else []
        flags += [f"--offload-blocks {self.offload_blocks}"] if self.offload_blocks else []
        return " ".join(flags)

    @property
    def provenance(self) -> dict[str, str]:
        """Return what a file says of its teacher, unless that was held in fp32."""
        return {"frozen": self.frozen} if self.frozen != "fp32" else {}


class Float8Linear(nn.Linear):
    """A frozen linear layer whose weight is fp8 (e4m3), made wide again whenever it is used.

    weight: [out, in]; times `scale` [out, 1] fp32, a power of two, it is the layer's weight, and
    exact in bf16. Its largest value a row is brought near fp8's own.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] and bias [out] in any wider dtype; the bias is kept in bf16."""
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        largest = weight.detach().float().abs().amax(dim=1, keepdim=True)
        exponent = torch.frexp(largest / torch.finfo(_FP8).max).exponent
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        self.weight = nn.Parameter((weight.detach().float() / scale).to(_FP8), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.bfloat16(), requires_grad=False)
        self.register_buffer("scale", scale)

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


def place(model: nn.Module, name: str, value: Tensor, frozen: str) -> None:
    """Put a tensor into a model as the parameter `name`, as `frozen` holds it.

    A linear layer of a block is replaced as soon as its weight is placed; its bias may come before
    or after.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if frozen == "fp8" and _is_narrow(name, tuple(value.shape)):
        bias = owner.bias
        owner = Float8Linear(value, None)
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
        if frozen == "fp8" and _is_narrow(name, shape):
            total += math.prod(shape) + _SCALE_BYTES * shape[0]
        else:
            total += math.prod(shape) * _DTYPES[frozen].itemsize
    return total


def _is_narrow(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def _widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) * scale.to(dtype)
