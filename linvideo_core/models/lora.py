"""Low-rank weight changes of frozen linear layers.

The change lives in a submodule `lora` of each layer, so the layer's own parameter names stay as
they are in the checkpoint. A forward hook adds it to the layer's output; in a layer that is small
beside its rank it is added to the weight, which then costs less.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..run.errors import SettingError


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


class MergedLinear(nn.Linear):
    """A frozen linear layer whose change is added to its weight, in fp32, whenever it is used."""

    lora: LowRank

    def __init__(self, linear: nn.Linear) -> None:
        """Take a layer's own parameters over; its change is yet to be set."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        with torch.autocast(x.device.type, enabled=False):
            weight = torch.addmm(self.weight, self.lora.up, self.lora.down)
        return nn.functional.linear(x, weight, self.bias)


def check_rank(shapes: Mapping[str, tuple[int, ...]], prefix: str, rank: int) -> None:
    """Raise SettingError when a rank is too large for a linear layer under `prefix`.

    shapes: of parameters by name.
    """
    for name, shape in shapes.items():
        is_linear = name.endswith(".weight") and len(shape) == 2
        if name.startswith(prefix) and is_linear and rank > min(shape):
            layer = name.removesuffix(".weight")
            raise SettingError(
                f"{{lora_rank}} {rank} exceeds {min(shape)}, the full rank of {layer}", "lora_rank"
            )


def attach(
    model: nn.Module,
    prefix: str,
    rank: int,
    seed: int,
    device: torch.device | None = None,
    *,
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> dict[str, LowRank]:
    """Give every linear layer under `prefix` a low-rank change and freeze all else.

    device: where the changes work; none: each where its layer's weight is.
    is_frozen: says of a layer's name whether it stays without one.

    Returns the changes by the layer's name.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    changes = {}
    for name, module in list(model.named_modules()):
        is_free = name.startswith(prefix) and not is_frozen(f"{name}.")
        if is_free and isinstance(module, nn.Linear):
            check_rank({f"{name}.weight": tuple(module.weight.shape)}, prefix, rank)
            change = changes[name] = LowRank(module, rank, generator, device)
            if _is_small(module, rank):
                module = MergedLinear(module)
                model.set_submodule(name, module)
            else:
                module.register_forward_hook(_add_change)
            module.lora = change
    return changes


def _is_small(module: nn.Linear, rank: int) -> bool:
    """Return whether a whole weight's gradient costs less than two products more for each token.

    A narrower weight would round a small change away, and other kinds of layers compute otherwise.
    """
    is_plain = type(module) is nn.Linear and module.weight.dtype == torch.float32
    return is_plain and 4 * rank >= min(module.weight.shape)


def _add_change(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.lora(args[0])
