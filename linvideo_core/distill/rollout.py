"""What a few-step generator is trained on: DMD2's batches and its backward simulation."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import VelocityFn, add_noise, velocity_to_x0
from ..run.process_group import SINGLE_PROCESS, ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """One process's rows of what is random in sampling a batch up to each row's exit.

    prompt: [B] int64. exits: [B] int64 on the CPU, falling, the step at which each row leaves.
    noise: [B, C, F, H, W]. fresh: for each step that some row of the whole batch goes beyond, the
        noise [n, C, F, H, W] of this process's first n rows, which do.
    """

    prompt: Tensor
    exits: Tensor
    noise: Tensor
    fresh: list[Tensor]


def draw_exits(num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Draw the step in [0, num_steps) at which each sample leaves the sampler, [num_samples] int64.

    All steps alike, up to one sample, in falling order.
    """
    offset = torch.randint(num_steps, (), generator=generator)
    exits = (torch.arange(num_samples) + offset) % num_steps
    return exits.sort(descending=True).values


def draw_rollout(
    prompt: Tensor,
    exits: Tensor,
    shape: tuple[int, ...],
    on_device: torch.Generator,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Rollout:
    """Draw the noise of a whole batch; return this process's rows.

    prompt, exits: [B] of the whole batch; shape: of one row's latents.
    on_device: a generator on the device; noise is drawn as `sample_few_step` draws it.
    """

    def draw(rows: int) -> Tensor:
        device = on_device.device
        return processes.share(torch.randn(rows, *shape, generator=on_device, device=device))

    noise = draw(len(exits))
    fresh = [draw(int((exits > step).sum())) for step in range(int(exits[0]))]
    share = processes.share
    return Rollout(prompt=share(prompt), exits=share(exits), noise=noise, fresh=fresh)


@torch.no_grad()
def simulate_backward(
    velocity_of: Callable[[int], VelocityFn], rollout: Rollout, sigmas: Tensor
) -> Tensor:
    """Take each row to where `sample_few_step` calls the model for the step of its exit.

    The generator is then trained on what it meets in sampling (DMD2's backward simulation).

    velocity_of: number n -> the velocity function of the first n rows.

    Returns latents [B, C, F, H, W] at `sigmas[exits]`; without a gradient.
    """
    latents = rollout.noise.clone()
    for step, fresh in enumerate(rollout.fresh):
        # All processes must call a sharded model: one with no row left calls it, too.
        count, calling = len(fresh), max(len(fresh), 1)
        sigma, sigma_next = (s.to(latents.device).expand(calling) for s in sigmas[step : step + 2])
        velocity = velocity_of(calling)(latents[:calling], sigma)
        x0 = velocity_to_x0(latents[:calling], velocity, sigma)
        latents[:count] = add_noise(x0[:count], fresh.to(x0.dtype), sigma_next[:count])
    return latents
