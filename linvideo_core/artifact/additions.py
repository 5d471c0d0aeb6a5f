"""Add changes to a model's weights, so that they can be taken out again bit for bit."""

import contextlib
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.rounded import Float8Linear
from .contents import ArtifactError


@torch.no_grad()
def add_change(
    undo: contextlib.ExitStack,
    model: nn.Module,
    name: str,
    factors: Sequence[Tensor],
    strength: float,
) -> None:
    """Add `strength` times the product of the factors to a parameter, and note how to undo it.

    The sum is taken in fp32 and stored in the parameter's dtype; a copy of the parameter waits in
    CPU memory, so that the accelerator's memory does not grow. An fp8 weight, in which most of the
    change would be rounded away, stays as it is: the change is computed beside it.

    factors: one change, or matrices whose product has as many elements as the parameter.

    Raises ArtifactError, leaving the parameter as it was, when the sum overflows.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, Float8Linear) and leaf == "weight":
        hook = functools.partial(_add_beside, tuple(factors), strength)
        undo.callback(owner.register_forward_hook(hook).remove)
        return
    parameter = model.get_parameter(name)
    factors = [factor.to(parameter.device, torch.float32) for factor in factors]
    change = functools.reduce(torch.matmul, factors).reshape(parameter.shape)
    total = (parameter.float() + strength * change).to(parameter.dtype)
    if not total.isfinite().all():
        raise ArtifactError(f"the change of {name} overflows {parameter.dtype}: lower the strength")
    undo.callback(_overwrite, parameter, parameter.detach().to("cpu", copy=True))
    _overwrite(parameter, total)


@torch.no_grad()
def _overwrite(parameter: Tensor, value: Tensor) -> None:
    if parameter.is_cpu and torch.cuda.is_initialized():
        # An offloaded weight may be on its way to the device.
        torch.cuda.synchronize()
    parameter.copy_(value)


def _add_beside(
    factors: Sequence[Tensor],
    strength: float,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    change = args[0].to(output.dtype)
    for factor in reversed(factors):
        change = F.linear(change, factor.to(change))
    return output + strength * change
