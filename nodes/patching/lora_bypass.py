"""Low-rank weight changes computed beside their layers: the weights themselves stay as they are.

Merged into a quantised weight, a change is rounded away with it. Beside the layer it is exact,
costs little, and can rest while the layer goes on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .forward_patch import Part, call_previous, part_of, replace_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bypassed:
    """Changes that are not merged: name of a layer -> down [R, in] and up [out, R]."""

    low_rank: Mapping[str, tuple[Tensor, Tensor]]
    strength: float


class LowRankChange(Part):
    """The change of one layer, `strength up down`."""

    def __init__(self, down: Tensor, up: Tensor, strength: float, **settings: Any) -> None:
        """settings: operations and the device of the weights."""
        super().__init__()
        linear = settings.pop("operations").Linear
        self.strength = strength
        for name, weight in (("down", down), ("up", up)):
            layer = linear(*reversed(weight.shape), bias=False, dtype=weight.dtype, **settings)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input x [..., in] to the change [..., out] of its output."""
        return self.strength * self.up(self.down(x))

    def change_weight(self, weight: Tensor) -> Tensor:
        """Return a changed copy of a weight [out, in] that ComfyUI has dequantised for one call."""
        if self.is_resting:
            return weight
        identity = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
        return weight + self(identity).T


class LowRankChanges(nn.Module):
    """Every bypassed change, in a module that ComfyUI moves with the model."""

    def __init__(self, bypassed: Bypassed, *, operations: Any, device: torch.device) -> None:
        """operations: `comfy.ops.manual_cast`; the changes are empty until `load`."""
        super().__init__()
        self.layer_names = tuple(bypassed.low_rank)
        settings = {"operations": operations, "device": device}
        self.layers = nn.ModuleList(
            LowRankChange(*pair, bypassed.strength, **settings)
            for pair in bypassed.low_rank.values()
        )

    def load(self, bypassed: Bypassed, *, assign: bool) -> None:
        """Take the changes' tensors."""
        state = {}
        for index, (down, up) in enumerate(bypassed.low_rank.values()):
            state |= {f"layers.{index}.down.weight": down, f"layers.{index}.up.weight": up}
        self.load_state_dict(state, assign=assign)
        self.requires_grad_(False)


def change_layers(diffusion_model: nn.Module, changes: LowRankChanges) -> None:
    """Let every layer compute its change, until `restore_forward` and `restore_weight`."""
    for name, change in zip(changes.layer_names, changes.layers, strict=True):
        layer = diffusion_model.get_submodule(name)
        if _is_read_without_forward(layer):
            layer.weight_function = [*layer.weight_function, change.change_weight]
        else:
            replace_forward(layer, _changed_forward, change)


def restore_weight(layer: nn.Module) -> None:
    """Take ours from the functions that ComfyUI calls on a layer's weight."""
    functions = layer.__dict__.get("weight_function", ())
    others = [f for f in functions if not isinstance(getattr(f, "__self__", None), LowRankChange)]
    if len(others) < len(functions):
        layer.weight_function = others


def _is_read_without_forward(layer: nn.Module) -> bool:
    """Say whether ComfyUI may fuse a layer with what is before it and never call its forward.

    Such a layer takes its change in its weight, which costs it its fast 8-bit product.
    """
    return getattr(layer.weight, "_layout_cls", None) == "TensorWiseINT8Layout"


def _changed_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output = call_previous(self, x, *args, **kwargs)
    change = part_of(self)
    return output if change is None or change.is_resting else output + change(x)
