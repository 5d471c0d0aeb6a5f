"""How chosen layers compute linear attention while ComfyUI samples, and stop when it is done.

ComfyUI calls `inject` and `eject` with the patcher that it runs: nothing is remembered from the
time when a node ran. A layer keeps its class's own forward (projections, norms, RoPE, patches of
other packs); only the attention call inside is answered by ours, whatever backend or override the
user chose for the rest.

What a changed module computes with, and the forward that stood there before, lie in the module's
`__dict__`: as attributes they would become part of the user's model.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from .additional_models import LowRankChange, LowRankChanges, Part
from .attention_override import run_answered
from .families import host_family
from .model_calls import expect_layers, expect_nothing
from .weights import check_merged

KEY = "linvideo"
"""Ours among a ModelPatcher's attachments, injections, callbacks and additional models."""

_PART, _FORWARD, _PREVIOUS = "_linvideo_part", "_linvideo_forward", "_linvideo_previous"


def inject(patcher: Any) -> None:
    """Make the patcher's layers linear, with their changes; doing it again changes nothing."""
    eject(patcher)
    check_merged(patcher)
    maps, *changes = (part.model for part in patcher.get_additional_models_with_key(KEY))
    family = host_family(maps.family_name)
    for name, layer_maps in zip(maps.site_names, maps.layers, strict=True):
        attention = patcher.model.diffusion_model.get_submodule(name)
        layer_maps.run_fused = family.run_fused
        _replace_forward(attention, _linear_forward, layer_maps)
    if changes:
        _change_layers(patcher.model.diffusion_model, changes[0])
    expect_layers(patcher.model, maps)


def eject(patcher: Any) -> None:
    """Undo what `inject` did, by whichever patcher of this model; what is not ours stays."""
    expect_nothing(patcher.model)
    for module in patcher.model.diffusion_model.modules():
        _restore_forward(module)
        _restore_weight(module)


def _replace_forward(module: nn.Module, function: Callable[..., Any], part: Part) -> None:
    """Let a module compute `function(module, ...)`, for one module always the same function."""
    fields = module.__dict__
    fields[_PART] = part
    if "forward" in fields:
        fields[_PREVIOUS] = fields["forward"]
    # One bound method for the module's life: torch.compile takes a new one for new code.
    fields["forward"] = fields.setdefault(_FORWARD, MethodType(function, module))


def _restore_forward(module: nn.Module) -> None:
    fields = module.__dict__
    if _FORWARD not in fields:
        return
    fields.pop(_PART, None)
    previous = fields.pop(_PREVIOUS, None)
    if fields.get("forward") is fields[_FORWARD]:
        del fields["forward"]
        if previous is not None:
            fields["forward"] = previous


def _call_previous(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute a module as it was before its forward was replaced."""
    previous = module.__dict__.get(_PREVIOUS)
    if previous is not None:
        return previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _linear_forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward with linear attention, or the family's faster way to the same."""
    kwargs["transformer_options"] = dict(transformer_options or {})
    maps = self.__dict__.get(_PART)
    if maps is not None:
        maps.num_runs += 1
    if maps is None or maps.is_resting:
        return _call_previous(self, x, *args, **kwargs)
    fused = maps.run_fused(self, maps, x, *args, **kwargs)
    return run_answered(self, maps, x, *args, **kwargs) if fused is None else fused


def _change_layers(diffusion_model: nn.Module, changes: LowRankChanges) -> None:
    for name, change in zip(changes.layer_names, changes.layers, strict=True):
        layer = diffusion_model.get_submodule(name)
        if getattr(layer.weight, "_layout_cls", None) == "TensorWiseINT8Layout":
            # ComfyUI may fuse such a layer with what is before it and never call its forward. In
            # its weight the change costs it its fast 8-bit product.
            layer.weight_function = [*layer.weight_function, change.change_weight]
        else:
            _replace_forward(layer, _changed_forward, change)


def _changed_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output = _call_previous(self, x, *args, **kwargs)
    change = self.__dict__.get(_PART)
    return output if change is None or change.is_resting else output + change(x)


def _restore_weight(layer: nn.Module) -> None:
    """Take ours from the functions that ComfyUI calls on a layer's weight."""
    functions = layer.__dict__.get("weight_function", ())
    others = [f for f in functions if not isinstance(getattr(f, "__self__", None), LowRankChange)]
    if len(others) < len(functions):
        layer.weight_function = others
