"""The sampler of few-step models: predict the clean video, add fresh noise, predict again.

It is the loop of consistency and DMD2 models; ComfyUI calls it `lcm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .flow import VelocityFn, add_noise, velocity_to_x0


@torch.no_grad()
def sample_few_step(
    velocity_fn: VelocityFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Predict x0 at each of `sigmas` [steps + 1] but the last, then noise it to the next.

    noise: [B, C, F, H, W] at the first sigma.
    generator: draws the fresh noise on its own device, none for a next sigma of 0. It must not
        repeat the noise that sampling starts from: ComfyUI's lcm takes the next seed on a CPU.
    on_step: called after each prediction with (step index, latents, x0).

    Returns the latents at the last sigma: the last x0 where that is 0.
    """
    latents = noise
    sigmas = sigmas.to(noise.device)
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = (s.expand(noise.shape[0]) for s in (sigmas[i], sigmas[i + 1]))
        x0 = velocity_to_x0(latents, velocity_fn(latents, sigma), sigma)
        if on_step is not None:
            on_step(i, latents, x0)
        latents = x0
        if sigmas[i + 1] > 0:
            fresh = torch.randn(
                x0.shape, generator=generator, device=generator.device, dtype=x0.dtype
            )
            latents = add_noise(x0, fresh.to(x0.device), sigma_next)
    return latents
