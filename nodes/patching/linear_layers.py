"""The linear attention of a linearized MODEL, as weights that ComfyUI moves with it."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...linvideo_core.artifact import Artifact
from ...linvideo_core.models.attention import attend_linearly
from ...linvideo_core.models.config import LinearForm
from .forward_patch import Part

# How a tensor of `LinearAttention` lies in the weight [out, in] of a Linear.
_AS_WEIGHT = {
    "query_map": "n d m -> (n m) d",
    "key_map": "n d m -> (n m) d",
    "gate": "n d -> n d",
    "window_mix": "n -> n 1",
}


class LayerMaps(Part):
    """The tensors of one layer's linear attention, and the attention that they make.

    They are weights of the host's own Linear and are read through its forward alone, because the
    host may keep them elsewhere, in another dtype, until it casts them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], form: LinearForm, **settings: Any) -> None:
        """tensors: as the artifact names them; settings: operations, and the weights' device."""
        super().__init__()
        self.form = form
        self.num_maps = tensors["query_map"].shape[0]
        linear = settings.pop("operations").Linear
        for name, weight in _as_weights(tensors).items():
            layer = linear(*reversed(weight.shape), bias=False, dtype=weight.dtype, **settings)
            self.add_module(name, layer)
        self.num_runs = 0  # of the layer, in the model's present call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in O(L); query, key, value and the result are [B, L, N, D]."""
        identity = torch.eye(query.shape[-1], device=query.device)
        query_map, key_map = (
            rearrange(weights(identity), "d (n m) -> n d m", n=self.num_maps)
            for weights in (self.query_map, self.key_map)
        )
        gate = self.gate(identity).T if self.form.output_gate else None
        window_mix = self.window_mix(identity[:1, :1])[0] if self.form.window else None
        maps = (query_map, key_map, gate, window_mix)
        return attend_linearly(query, key, value, *maps, form=self.form)


class FeatureMaps(nn.Module):
    """The tensors of every linear layer, and which of the model's layers they are for."""

    def __init__(self, artifact: Artifact, *, operations: Any, device: torch.device) -> None:
        """operations: `comfy.ops.manual_cast`; the tensors are empty until `load`."""
        super().__init__()
        self.family_name = artifact.header.family
        self.indices = artifact.header.linear_layers
        self.site_names = artifact.header.site_names
        self.layers = nn.ModuleList()
        settings = {"operations": operations, "device": device}
        for layer in artifact.header.linear_layers:
            tensors = artifact.linear[layer]
            self.layers.append(LayerMaps(tensors, artifact.header.form, **settings))

    def load(self, artifact: Artifact, *, assign: bool) -> None:
        """Take the tensors of an artifact's linear layers."""
        state = {}
        for index, layer in enumerate(artifact.header.linear_layers):
            for name, weight in _as_weights(artifact.linear[layer]).items():
                state[f"layers.{index}.{name}.weight"] = weight
        self.load_state_dict(state, assign=assign)
        self.requires_grad_(False)


def _as_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: rearrange(x, _AS_WEIGHT[name]).contiguous() for name, x in tensors.items()}
