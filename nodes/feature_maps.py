"""The feature maps of a linearized MODEL, as weights that ComfyUI moves with it."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..linvideo_core.artifact import Artifact
from ..linvideo_core.kernels import linear_attention
from .forwards import Part


class LayerMaps(Part):
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
        self.num_runs = 0  # of the layer, in the model's present call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in O(L); query, key, value and the result are [B, L, N, D]."""
        identity = torch.eye(query.shape[-1], device=query.device)
        query_map, key_map = (
            rearrange(weights(identity), "d (n m) -> n d m", n=query.shape[2])
            for weights in (self.query_map, self.key_map)
        )
        return linear_attention(query, key, value, query_map, key_map)


class FeatureMaps(nn.Module):
    """The feature maps of every linear layer, and which of the model's layers they are for."""

    def __init__(self, artifact: Artifact, *, operations: Any, device: torch.device) -> None:
        """operations: `comfy.ops.manual_cast`; the maps are empty until `load`."""
        super().__init__()
        self.family_name = artifact.header.family
        self.indices = artifact.header.layers
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
