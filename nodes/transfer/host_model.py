"""A host's diffusion model as the core trains it: one call, one attention module at each site.

Made of a twin that `frozen_weights.freeze` made: it is changed in place, the graph's model is not.
"""

import functools
from types import MethodType
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...linvideo_core.models.attention import SoftmaxAttention
from ...linvideo_core.models.attention_sites import AttentionSite
from ..patching.attention_override import answer
from ..patching.families import HostFamily
from ..patching.families.video import Video
from .conditioning import Conditions


class HostModel(nn.Module):
    """`(latents, timesteps, prompt_embeds) -> velocity`, its parameters under their own names."""

    def __init__(
        self,
        diffusion_model: nn.Module,
        sites: list[AttentionSite],
        conditions: Conditions,
        *,
        dtype: torch.dtype,
        family: HostFamily,
        video: Video,
        timestep_scale: float = 1.0,
    ) -> None:
        """diffusion_model: a twin that nothing else uses.

        dtype: in which it computes; timestep_scale: the model's own timesteps over [0, 1000].
        """
        super().__init__()
        for name, module in diffusion_model.named_children():
            self.add_module(name, module)
        for name, parameter in diffusion_model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        family.prepare_for_training(diffusion_model)
        for site in sites:
            _give_attention(diffusion_model.get_submodule(site.name), family)
        # Beside the registry of modules, which would list every parameter a second time.
        self.__dict__["_diffusion_model"] = diffusion_model
        self._concat, self._inputs = conditions.concat, conditions.inputs
        self._video, self._dtype = video, dtype
        self._timestep_scale = timestep_scale

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the velocity of latents [B, C, F, H, W] in their dtype.

        timesteps: [B] in [0, 1000]; prompt_embeds: [B, S, T].
        """
        B, dtype = len(latents), self._dtype
        x = latents.to(dtype)
        if self._concat is not None:
            x = torch.cat([x, _repeat(self._concat.to(x), B)], dim=1)
        inputs = {
            name: _repeat(value.to(x.device, dtype), B) if torch.is_tensor(value) else value
            for name, value in self._inputs.items()
        }
        # What is computed in which precision is the host's business: its layers cast by themselves.
        with torch.autocast(x.device.type, enabled=False):
            velocity = self._video.call(
                self._diffusion_model,
                x,
                self._timestep_scale * timesteps.float(),
                prompt_embeds.to(dtype),
                {"optimized_attention_override": _attend_with_gradient},
                inputs,
            )
        return velocity.to(latents.dtype)


def _give_attention(layer: nn.Module, family: HostFamily) -> None:
    """Give an attention layer a submodule that attends, where the core can put another."""
    layer.attention = SoftmaxAttention()
    layer.__dict__["run_fused"] = functools.partial(family.run_fused, in_training=True)
    layer.__dict__["forward"] = MethodType(_forward, layer)


def _forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward, its one attention call answered by the submodule."""
    options = dict(transformer_options or {})
    fused = self.run_fused(self, self.attention, x, *args, transformer_options=options, **kwargs)
    if fused is not None:
        return fused

    def attend(_: Any, *call_args: Any, **call_options: Any) -> Tensor:
        return answer(self.attention, *call_args, **call_options)

    options["optimized_attention_override"] = attend
    return type(self).forward(self, x, *args, transformer_options=options, **kwargs)


def _attend_with_gradient(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Attend as PyTorch does: the backend that the user chose may have no backward pass."""
    return attention_pytorch(*args, **kwargs)


def _repeat(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape[1:])
