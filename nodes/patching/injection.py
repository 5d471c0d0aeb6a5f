"""How chosen layers compute linear attention while ComfyUI samples, and stop when it is done.

ComfyUI calls `inject` and `eject` with the patcher that it runs: nothing is remembered from the
time when a node ran. A layer keeps its class's own forward (projections, norms, RoPE, patches of
other packs); only the attention call inside is answered by ours, whatever backend or override the
user chose for the rest.
"""

from typing import Any

from torch import Tensor, nn

from .attention_override import answer
from .call_checks import start_watching, stop_watching
from .families import host_family
from .forward_patch import call_previous, part_of, replace_forward, restore_forward
from .lora_bypass import change_layers, restore_weight
from .weight_patches import check_merged

KEY = "linvideo"
"""Ours among a ModelPatcher's attachments, injections, callbacks and additional models."""


def inject(patcher: Any) -> None:
    """Make the patcher's layers linear, with their changes; doing it again changes nothing."""
    eject(patcher)
    check_merged(patcher)
    maps, *changes = (part.model for part in patcher.get_additional_models_with_key(KEY))
    family = host_family(maps.family_name)
    for name, layer_maps in zip(maps.site_names, maps.layers, strict=True):
        attention = patcher.model.diffusion_model.get_submodule(name)
        layer_maps.run_fused = family.run_fused
        replace_forward(attention, _linear_forward, layer_maps)
    if changes:
        change_layers(patcher.model.diffusion_model, changes[0])
    start_watching(patcher.model, maps)


def eject(patcher: Any) -> None:
    """Undo what `inject` did, by whichever patcher of this model; what is not ours stays."""
    stop_watching(patcher.model)
    for module in patcher.model.diffusion_model.modules():
        restore_forward(module)
        restore_weight(module)


def _linear_forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward, its one attention call answered by the layer's maps.

    Where the family has a faster way to the same result, that is taken.
    """
    options = dict(transformer_options or {})
    maps = part_of(self)
    if maps is not None:
        maps.num_runs += 1
    if maps is None or maps.is_resting:
        return call_previous(self, x, *args, transformer_options=options, **kwargs)
    fused = maps.run_fused(self, maps, x, *args, transformer_options=options, **kwargs)
    if fused is not None:
        return fused
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
