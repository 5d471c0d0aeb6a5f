"""Add changes to a model's weights in place, so that they can be taken out again bit for bit."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    CPU memory, so that the accelerator's memory does not grow.

    factors: one change, or matrices whose product has as many elements as the parameter.

    Raises ArtifactError, leaving the parameter as it was, when the sum overflows.
    """
    parameter = model.get_parameter(name)
    factors = [factor.to(parameter.device, torch.float32) for factor in factors]
    change = functools.reduce(torch.matmul, factors).reshape(parameter.shape)
    total = (parameter.float() + strength * change).to(parameter.dtype)
    if not total.isfinite().all():
        raise ArtifactError(f"the change of {name} overflows {parameter.dtype}: lower the strength")
    undo.callback(_overwrite, parameter, parameter.detach().to("cpu", copy=True))
    parameter.copy_(total)


@torch.no_grad()
def _overwrite(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
