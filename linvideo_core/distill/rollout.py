"""What a few-step generator meets when it is sampled, for its training: DMD2's simulation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import VelocityFn, add_noise, velocity_to_x0
from ..run.process_group import SINGLE_PROCESS, ProcessGroup


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
    processes: ProcessGroup = SINGLE_PROCESS,
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
        count, num_left = int(processes.share(is_left).sum()), int(is_left.sum())
        # Sharded models are called by all processes alike: one with no sample left calls along.
        calling = max(count, 1)
        sigma, sigma_next = (s.to(noise.device).expand(calling) for s in sigmas[i : i + 2])
        velocity = velocity_of(calling)(latents[:calling], sigma)
        x0 = velocity_to_x0(latents[:calling], velocity, sigma)
        fresh = torch.randn(
            (num_left, *x0.shape[1:]), generator=generator, device=generator.device, dtype=x0.dtype
        )
        fresh = processes.share(fresh).to(x0.device)
        latents[:count] = add_noise(x0[:count], fresh, sigma_next[:count])
    return latents
