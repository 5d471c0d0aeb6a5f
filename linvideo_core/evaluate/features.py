"""Describe videos by the activations of the teacher's own middle layer.

A diffusion model's activations at low noise tell content as a trained classifier's do (Tang et al.
2023), so a Frechet distance on them needs no other network for any model and kind of video.
"""

import torch
from torch import Tensor, nn

from ..flow import add_noise, bind
from ..models.attention import LinearAttention, MixedAttention
from ..models.attention_sites import attention_at, shapes_of
from ..models.experts import expert_at
from ..models.families import identify

# Enough noise for the model to be at home, little enough for it to see what is there.
SIGMA = 0.25


@torch.no_grad()
def teacher_features(
    teacher: nn.Module, latents: Tensor, noise: Tensor, embeds: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """Return the output of the middle layer's self-attention at sigma 0.25, averaged over tokens.

    Attention is computed on normalised input: no few huge channels of the residual stream decide.

    teacher: with softmax at every site.
    latents: [B, C, F, H, W], x0. noise: alike; the same for all models that are compared.
    embeds: [S, T], one prompt for all, such as the negative one, so that prompts tell nothing.

    Returns [B, N D] fp32.
    Raises ValueError where the model has linear layers: it is no teacher then.
    """
    expert = expert_at(teacher, SIGMA)
    _, sites = identify(shapes_of(expert))
    modules = [attention_at(expert, site) for site in sites]
    if any(isinstance(module, LinearAttention | MixedAttention) for module in modules):
        raise ValueError("the model has linear layers; features are taken from the teacher alone")
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.float().mean(dim=1).flatten(1))

    sigma = torch.full((len(latents),), SIGMA, device=latents.device)
    velocity_fn = bind(teacher, embeds.expand(len(latents), -1, -1), precision=precision)
    hook = modules[len(modules) // 2].register_forward_hook(keep)
    try:
        velocity_fn(add_noise(latents, noise, sigma), sigma)
    finally:
        hook.remove()
    (features,) = found
    return features
