"""A file's tensors as a model beside the user's: ComfyUI loads, counts and offloads it as one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from einops import rearrange
from torch import Tensor, nn

from ...linvideo_core.artifact import Artifact
from ...linvideo_core.models.attention import LinearForm, attend_linearly

# How a tensor of `LinearAttention` lies in the weight [out, in] of a Linear.
_AS_WEIGHT = {
    "query_map": "n d m -> (n m) d",
    "key_map": "n d m -> (n m) d",
    "gate": "n d -> n d",
    "window_mix": "n -> n 1",
}


class Part(nn.Module):
    """What one layer of the user's model computes with; while it rests, the layer is as it was.

    The tensors are weights of ComfyUI's own Linear and are read through its forward alone, because
    ComfyUI may keep them elsewhere, in another dtype, until it casts them.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """weights: [out, in] by name, of which the shapes and dtypes are taken."""
        super().__init__()
        self.is_resting = False
        for name, weight in weights.items():
            settings = {"bias": False, "dtype": weight.dtype, "device": device}
            layer = comfy.ops.manual_cast.Linear(*reversed(weight.shape), **settings)
            self.add_module(name, layer)


class LayerMaps(Part):
    """The tensors of one layer's linear attention, and the attention that they make."""

    def __init__(
        self, tensors: Mapping[str, Tensor], form: LinearForm, device: torch.device
    ) -> None:
        """tensors: as the artifact names them."""
        super().__init__(_as_weights(tensors), device)
        self.form = form
        self.num_maps = tensors["query_map"].shape[0]
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
    """The linear attention of every linear layer, and which of the model's layers they are."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        super().__init__()
        header = artifact.header
        self.family_name = header.family
        self.linear_layers = header.linear_layers
        self.site_names = header.site_names
        self.layers = nn.ModuleList(
            LayerMaps(artifact.linear[layer], header.form, device) for layer in header.linear_layers
        )

    @staticmethod
    def weights_of(artifact: Artifact) -> list[dict[str, Tensor]]:
        """Return the weights of each of `layers`."""
        return [_as_weights(artifact.linear[layer]) for layer in artifact.header.linear_layers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bypassed:
    """Weight changes that are not merged: name of a layer -> down [R, in] and up [out, R]."""

    low_rank: Mapping[str, tuple[Tensor, Tensor]]
    strength: float


class LowRankChange(Part):
    """The change of one layer, `strength up down`.

    Merged into a quantised weight it would be rounded away; beside the layer it is exact, costs
    little, and can rest while the layer goes on.
    """

    def __init__(self, down: Tensor, up: Tensor, strength: float, device: torch.device) -> None:
        super().__init__({"down": down, "up": up}, device)
        self.strength = strength

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
    """Every bypassed change, and the names of the layers that they change."""

    def __init__(self, bypassed: Bypassed, device: torch.device) -> None:
        super().__init__()
        self.layer_names = tuple(bypassed.low_rank)
        self.layers = nn.ModuleList(
            LowRankChange(*pair, bypassed.strength, device) for pair in bypassed.low_rank.values()
        )

    @staticmethod
    def weights_of(bypassed: Bypassed) -> list[dict[str, Tensor]]:
        """Return the weights of each of `layers`."""
        return [{"down": down, "up": up} for down, up in bypassed.low_rank.values()]


def make_patcher(
    kind: type[FeatureMaps] | type[LowRankChanges],
    contents: Artifact | Bypassed,
    load_device: torch.device,
    offload_device: torch.device,
    *,
    disable_dynamic: bool = False,
) -> Any:
    """Return `kind(contents)`, its tensors loaded, in a ModelPatcher."""
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    module = kind(contents, offload_device).eval()
    patcher = patcher_class(module, load_device=load_device, offload_device=offload_device)
    state = {
        f"layers.{index}.{name}.weight": weight
        for index, weights in enumerate(kind.weights_of(contents))
        for name, weight in weights.items()
    }
    module.load_state_dict(state, assign=is_dynamic(patcher))
    module.requires_grad_(False)
    # ComfyUI makes a patcher anew for another GPU, or to hold ordinary weights.
    patcher.cached_patcher_init = (make_patcher, (kind, contents, load_device, offload_device))
    return patcher


def is_dynamic(patcher: Any) -> bool:
    """Say whether a ModelPatcher's weights come to video memory when they are used."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def _as_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: rearrange(x, _AS_WEIGHT[name]).contiguous() for name, x in tensors.items()}
