"""How chosen Wan layers compute linear attention while ComfyUI samples, and stop when it is done.

ComfyUI calls `inject` and `eject` with the patcher that it runs: nothing is remembered from the
time when a node ran. A layer keeps its class's own forward (projections, norms, RoPE, patches of
other packs); only the attention call inside is answered by ours, whatever backend or override the
user chose for the rest.
"""

from types import MethodType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..linvideo_core.artifact import Artifact
from ..linvideo_core.kernels import linear_attention

KEY = "linvideo"
"""Ours among a ModelPatcher's attachments, injections, callbacks and additional models."""

_MAPS, _FORWARD, _PREVIOUS = "_linvideo_maps", "_linvideo_forward", "_linvideo_previous"


class LayerMaps(nn.Module):
    """The two feature maps of one layer, and the linear attention that they make.

    They are weights of the host's own Linear and are read through its forward alone, because the
    host may keep them elsewhere, in another dtype, until it casts them.
    """

    def __init__(self, num_heads: int, head_dim: int, half: int, **settings: Any) -> None:
        """half is M/2; settings: operations, and the device and dtype of the weights."""
        super().__init__()
        operations = settings.pop("operations")
        self.query_map = operations.Linear(head_dim, num_heads * half, bias=False, **settings)
        self.key_map = operations.Linear(head_dim, num_heads * half, bias=False, **settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Attend in O(L); query, key, value and the result are [B, L, N D]."""
        if query.ndim != 3 or not query.shape == key.shape == value.shape:
            raise RuntimeError(
                f"LinVideo cannot run this attention (query {list(query.shape)}, key "
                f"{list(key.shape)}): remove LinVideo Linearize, or the node that changes attention"
            )
        query, key, value = (
            rearrange(x, "b l (n d) -> b l n d", n=num_heads) for x in (query, key, value)
        )
        identity = torch.eye(query.shape[-1], device=query.device)
        query_map, key_map = (
            rearrange(weights(identity), "d (n m) -> n d m", n=num_heads)
            for weights in (self.query_map, self.key_map)
        )
        attended = linear_attention(query, key, value, query_map, key_map)
        return rearrange(attended, "b l n d -> b l (n d)")


class FeatureMaps(nn.Module):
    """The feature maps of every linear layer, in a module that ComfyUI moves with the model."""

    def __init__(self, artifact: Artifact, *, operations: Any, device: torch.device) -> None:
        """operations: `comfy.ops.manual_cast`; the maps are empty until `load`."""
        super().__init__()
        self.site_names = artifact.header.site_names
        self.layers = nn.ModuleList()
        for layer in artifact.header.layers:
            query_map, _ = artifact.feature_maps[layer]
            settings = {"operations": operations, "device": device, "dtype": query_map.dtype}
            self.layers.append(LayerMaps(*query_map.shape, **settings))

    def load(self, artifact: Artifact, *, assign: bool) -> None:
        """Take the maps of an artifact, [N, D, M/2] each."""
        state = {}
        for index, layer in enumerate(artifact.header.layers):
            pair = artifact.feature_maps[layer]
            for side, feature_map in zip(("query_map", "key_map"), pair, strict=True):
                weight = rearrange(feature_map, "n d m -> (n m) d").contiguous()
                state[f"layers.{index}.{side}.weight"] = weight
        self.load_state_dict(state, assign=assign)
        self.requires_grad_(False)


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


def eject(patcher: Any) -> None:
    """Undo what `inject` did, by whichever patcher of this model; what is not ours stays."""
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
    num_calls = 0

    def attend(
        _: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Any = None, **__: Any
    ) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if mask is not None:
            raise RuntimeError("LinVideo's linear layers take no attention mask: remove the mask")
        return maps(query, key, value, heads)

    options["optimized_attention_override"] = attend
    output = type(self).forward(self, x, *args, transformer_options=options, **kwargs)
    if num_calls != 1:
        raise RuntimeError(
            f"a linear layer asked for attention {num_calls} times instead of once: this ComfyUI "
            "computes Wan in a way that LinVideo does not know; update LinVideo"
        )
    return output
