"""Low-rank weight changes beside frozen linear layers.

The change lives in a submodule `lora` of each layer, so the layer's own parameter names stay as
they are in the checkpoint; a forward hook adds it to the layer's output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The product `up down` of rank R, in fp32; starts at zero because `up` does."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        """device: where it works; none: where the layer's weight is."""
        super().__init__()
        device = device or linear.weight.device
        down = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        # The optimiser's small steps would be lost in a layer's own bf16.
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to the change [..., out] of the layer's output."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return nn.functional.linear(nn.functional.linear(x, down), up)


def check_rank(shapes: Mapping[str, tuple[int, ...]], prefix: str, rank: int) -> None:
    """Raise ValueError when a rank is too large for a linear layer under `prefix`.

    shapes: of parameters by name.
    """
    for name, shape in shapes.items():
        is_linear = name.endswith(".weight") and len(shape) == 2
        if name.startswith(prefix) and is_linear and rank > min(shape):
            layer = name.removesuffix(".weight")
            raise ValueError(f"--lora-rank {rank} exceeds {min(shape)}, the full rank of {layer}")


def attach(
    model: nn.Module, prefix: str, rank: int, seed: int, device: torch.device | None = None
) -> dict[str, LowRank]:
    """Give every linear layer under `prefix` a low-rank change and freeze all else.

    device: where the changes work; none: each where its layer's weight is.

    Returns the changes by the layer's name.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    changes = {}
    for name, module in list(model.named_modules()):
        if name.startswith(prefix) and isinstance(module, nn.Linear):
            check_rank({f"{name}.weight": tuple(module.weight.shape)}, prefix, rank)
            module.lora = changes[name] = LowRank(module, rank, generator, device)
            module.register_forward_hook(_add_change)
    return changes


def _add_change(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.lora(args[0])
