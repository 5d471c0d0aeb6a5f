"""The sampler of few-step models: predict the clean video, add fresh noise, predict again.

It is the loop of consistency and DMD2 models; ComfyUI calls it `lcm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .flow import VelocityFn, add_noise, velocity_to_x0
from .team import ALONE, Team


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
    # Asked here, where it costs a GPU no wait.
    is_renoised = (sigmas[1:] > 0).tolist()
    sigmas = sigmas.to(noise.device)
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = (s.expand(noise.shape[0]) for s in (sigmas[i], sigmas[i + 1]))
        x0 = velocity_to_x0(latents, velocity_fn(latents, sigma), sigma)
        if on_step is not None:
            on_step(i, latents, x0)
        latents = x0
        if is_renoised[i]:
            fresh = torch.randn(
                x0.shape, generator=generator, device=generator.device, dtype=x0.dtype
            )
            latents = add_noise(x0, fresh.to(x0.device), sigma_next)
    return latents


def draw_exits(num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Draw the step in [0, num_steps) at which each sample leaves the sampler, [num_samples] int64.

    All steps alike, up to one sample, in falling order.
    """
    offset = torch.randint(num_steps, (), generator=generator)
    exits = (torch.arange(num_samples) + offset) % num_steps
    return exits.sort(descending=True).values


@torch.no_grad()
def simulate_backward(
    velocity_of: Callable[[int], VelocityFn],
    noise: Tensor,
    sigmas: Tensor,
    exits: Tensor,
    *,
    generator: torch.Generator,
    team: Team = ALONE,
) -> Tensor:
    """Take each sample to where `sample_few_step` calls the model for the step of its exit.

    What a generator is trained on is then what it meets in sampling (DMD2's backward simulation).

    velocity_of: number n -> the velocity function of the first n samples.
    noise: [B, C, F, H, W], this process's share.
    exits: of the whole batch, [B] int64 on the CPU, falling.
    generator: as in `sample_few_step`.

    Returns latents [B, C, F, H, W] at `sigmas[exits]`; without a gradient.
    """
    latents = noise.clone()
    for i in range(int(exits[0])):
        is_left = exits > i
        count, num_left = int(team.share(is_left).sum()), int(is_left.sum())
        # Sharded models are called by all processes alike: one with no sample left calls along.
        calling = max(count, 1)
        sigma, sigma_next = (s.to(noise.device).expand(calling) for s in sigmas[i : i + 2])
        velocity = velocity_of(calling)(latents[:calling], sigma)
        x0 = velocity_to_x0(latents[:calling], velocity, sigma)
        fresh = torch.randn(
            (num_left, *x0.shape[1:]), generator=generator, device=generator.device, dtype=x0.dtype
        )
        fresh = team.share(fresh).to(x0.device)
        latents[:count] = add_noise(x0[:count], fresh, sigma_next[:count])
    return latents
