"""Low-rank weight changes of frozen linear layers.

The change lives in a submodule `lora` of each layer, so the layer's own parameter names stay as
they are in the checkpoint. A forward hook adds it to the layer's output; in a layer that is small
beside its rank it is added to the weight, which then costs less.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..run.errors import SettingError


class LowRank(nn.Module):
    """The product `up down` of rank R, in fp32; starts at zero because `up` does.

    enabled: False leaves the layer as if it had no change.
    """

    enabled = True

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

    def add_to(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the change to a layer's output; a forward hook."""
        return output + self(args[0]) if self.enabled else output


class MergedLinear(nn.Linear):
    """A frozen linear layer whose changes are added to its weight, in fp32, whenever it is used.

    Its changes are its submodules.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take a layer's own parameters over; its changes are yet to be set."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        weight = self.weight
        with torch.autocast(x.device.type, enabled=False):
            for change in self.children():
                if change.enabled:
                    weight = torch.addmm(weight, change.up, change.down)
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
    adapter: str = "lora",
) -> dict[str, LowRank]:
    """Give every linear layer under `prefix` a low-rank change, which alone is trained there.

    device: where the changes work; none: each where its layer's weight is.
    is_frozen: says of a layer's name whether it stays without one.
    adapter: name of the submodule that holds the change; a layer may have several.

    Returns the changes by the layer's name.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, module in list(model.named_modules()):
        is_free = name.startswith(prefix) and not is_frozen(f"{name}.")
        if is_free and isinstance(module, nn.Linear):
            check_rank({f"{name}.weight": tuple(module.weight.shape)}, prefix, rank)
            change = changes[name] = LowRank(module, rank, generator, device)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if _is_small(module, rank):
                module = MergedLinear(module)
                model.set_submodule(name, module)
            if not isinstance(module, MergedLinear):
                change.hook = module.register_forward_hook(change.add_to)
            module.add_module(adapter, change)
    return changes


def detach(model: nn.Module, changes: Iterable[str], adapter: str = "lora") -> None:
    """Undo `attach`; changes: the names of the layers."""
    for name in changes:
        module = model.get_submodule(name)
        change = module._modules.pop(adapter)
        if not isinstance(module, MergedLinear):
            change.hook.remove()
        elif not module._modules:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight, linear.training = module.weight, module.training
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear)


def _is_small(module: nn.Linear, rank: int) -> bool:
    """Return whether a whole weight's gradient costs less than two products more for each token.

    A narrower weight would round a small change away, and other kinds of layers compute otherwise.
    """
    is_plain = type(module) is nn.Linear and module.weight.dtype == torch.float32
    return is_plain and 4 * rank >= min(module.weight.shape)


@contextlib.contextmanager
def switched(enabled: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Switch adapters, which have a field `enabled`, on or off while the context lasts."""
    before = {adapter: adapter.enabled for adapter in enabled}
    try:
        for adapter, is_on in enabled.items():
            adapter.enabled = is_on
        yield
    finally:
        for adapter, is_on in before.items():
            adapter.enabled = is_on
