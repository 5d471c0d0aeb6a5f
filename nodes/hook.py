"""How chosen layers compute linear attention while ComfyUI samples, and stop when it is done.

ComfyUI calls `inject` and `eject` with the patcher that it runs: nothing is remembered from the
time when a node ran. A layer keeps its class's own forward (projections, norms, RoPE, patches of
other packs); only the attention call inside is answered by ours, whatever backend or override the
user chose for the rest.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn

from .attention_call import answer
from .watch import start_watching, stop_watching

KEY = "linvideo"
"""Ours among a ModelPatcher's attachments, injections, callbacks and additional models."""

_MAPS, _FORWARD, _PREVIOUS = "_linvideo_maps", "_linvideo_forward", "_linvideo_previous"


def inject(patcher: Any) -> None:
    """Make the patcher's layers linear; doing it again changes nothing."""
    eject(patcher)
    maps = patcher.get_additional_models_with_key(KEY)[0].model
    for name, layer_maps in zip(maps.site_names, maps.layers, strict=True):
        attention = patcher.model.diffusion_model.get_submodule(name)
        # Straight into __dict__: as an attribute, the maps would become part of the user's model.
        fields = attention.__dict__
        fields[_MAPS] = layer_maps
        if "forward" in fields:
            fields[_PREVIOUS] = fields["forward"]
        # One bound method for the module's life: torch.compile takes a new one for new code.
        fields["forward"] = fields.setdefault(_FORWARD, MethodType(_linear_forward, attention))
    start_watching(patcher.model, maps)


def eject(patcher: Any) -> None:
    """Undo what `inject` did, by whichever patcher of this model; what is not ours stays."""
    stop_watching(patcher.model)
    for module in patcher.model.diffusion_model.modules():
        fields = module.__dict__
        if _FORWARD not in fields:
            continue
        fields.pop(_MAPS, None)
        previous = fields.pop(_PREVIOUS, None)
        if fields.get("forward") is fields[_FORWARD]:
            del fields["forward"]
            if previous is not None:
                fields["forward"] = previous


def _linear_forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward, its one attention call answered by the layer's maps."""
    options = dict(transformer_options or {})
    maps = self.__dict__.get(_MAPS)
    if maps is None:
        return type(self).forward(self, x, *args, transformer_options=options, **kwargs)
    maps.num_runs += 1
    num_calls = 0

    def attend(_: Any, *call_args: Any, **call_options: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return answer(maps, *call_args, **call_options)

    options["optimized_attention_override"] = attend
    output = type(self).forward(self, x, *args, transformer_options=options, **kwargs)
    if num_calls != 1:
        raise RuntimeError(
            f"a linear layer asked for attention {num_calls} times instead of once: this ComfyUI "
            "computes its model in a way that LinVideo does not know; update LinVideo"
        )
    return output
