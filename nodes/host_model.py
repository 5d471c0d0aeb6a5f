"""A host's diffusion model as the core trains it: one call, one attention module at each site.

Made of a deep clone that nothing else uses: it is changed in place and never given back.
"""

from types import MethodType
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ..linvideo_core.adapters import AttentionSite
from ..linvideo_core.attention import SoftmaxAttention
from ..linvideo_core.models.denoiser import TIMESTEP_SCALE
from .attention_call import answer
from .conditions import Conditions


class HostModel(nn.Module):
    """`(latents, timesteps, prompt_embeds) -> velocity`, its parameters under their own names."""

    def __init__(self, base_model: Any, sites: list[AttentionSite], conditions: Conditions) -> None:
        """base_model: ComfyUI's model around the diffusion model, loaded, of a deep clone."""
        super().__init__()
        diffusion_model = base_model.diffusion_model
        for name, module in diffusion_model.named_children():
            self.add_module(name, module)
        for name, parameter in diffusion_model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for site in sites:
            _give_attention(diffusion_model.get_submodule(site.name))
        # Beside the registry of modules, which would list every parameter a second time.
        self.__dict__["_diffusion_model"] = diffusion_model
        self._concat, self._inputs = conditions.concat, conditions.inputs
        self._dtype = base_model.get_dtype_inference()
        self._weights_dtype = next(self.parameters()).dtype
        self._timestep_scale = base_model.model_sampling.multiplier / TIMESTEP_SCALE

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the velocity of latents [B, C, F, H, W] in their dtype.

        timesteps: [B] in [0, 1000]; prompt_embeds: [B, S, T].
        """
        B = len(latents)
        weights_dtype = next(self.parameters()).dtype
        # A copy whose weights are trained is in fp32 and computes in it.
        dtype = self._dtype if weights_dtype == self._weights_dtype else weights_dtype
        x = latents.to(dtype)
        if self._concat is not None:
            x = torch.cat([x, _repeat(self._concat.to(x), B)], dim=1)
        inputs = {
            name: _repeat(value.to(x.device, dtype), B) if torch.is_tensor(value) else value
            for name, value in self._inputs.items()
        }
        velocity = self._diffusion_model(
            x,
            self._timestep_scale * timesteps.float(),
            context=prompt_embeds.to(dtype),
            transformer_options={"optimized_attention_override": _attend_with_gradient},
            **inputs,
        )
        return velocity.to(latents.dtype)


def _give_attention(layer: nn.Module) -> None:
    """Give an attention layer a submodule that attends, where the core can put another."""
    layer.attention = SoftmaxAttention()
    layer.__dict__["forward"] = MethodType(_forward, layer)


def _forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward, its one attention call answered by the submodule."""

    def attend(_: Any, *call_args: Any, **call_options: Any) -> Tensor:
        return answer(self.attention, *call_args, **call_options)

    options = {**(transformer_options or {}), "optimized_attention_override": attend}
    return type(self).forward(self, x, *args, transformer_options=options, **kwargs)


def _attend_with_gradient(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Attend as PyTorch does: the backend that the user chose may have no backward pass."""
    return attention_pytorch(*args, **kwargs)


def _repeat(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape[1:])
