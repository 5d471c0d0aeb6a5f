"""Distribution matching distillation (DMD2, arXiv 2405.14867): its batches, and its losses.

The losses are functions of velocities.

A few-step generator makes x0. At a noise level t, `x_t = (1 - t) x0 + t noise` has the density q_t
of the generator's videos, while p_t is the teacher's. For a rectified flow
`score = -(x_t + (1 - t) u) / t`, and `x0 = x_t - t u`, so with u_fake and u_real, the velocities of
the critic (fake score) and of the guided teacher (real score),

    dKL(q_t || p_t)/dx_t = s_fake - s_real = (1 - t)/t (u_real - u_fake)
                         = (1 - t)/t^2 (x0_fake - x0_real),    and dx_t/dx0 = 1 - t.

DMD takes the noise levels' weight out, all but the difference of the two clean estimates, and
divides by how far the teacher thinks x0 is from a video of its own (DMD eq. 8): every sample then
pushes alike, at any t.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import VelocityFn, add_noise, expand, shift_sigmas, velocity_to_x0
from ..run.process_group import SINGLE_PROCESS, ProcessGroup

_SIGMA_RANGE = (0.02, 0.98)
"""Timesteps 20 to 980: below, scores explode; above, both are the same."""
_TINY = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """One process's rows of what is random in sampling a part of a batch up to each row's exit.

    prompt: [B] int64. exits: [B] int64 on the CPU, falling, the step at which each row leaves.
    noise: [B, C, F, H, W]. fresh: for each step that some row of the part, in any process, goes
        beyond, the noise [n, C, F, H, W] of this process's first n rows, which do.
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


def draw_rollouts(
    prompt: Tensor,
    exits: Tensor,
    shape: tuple[int, ...],
    on_device: torch.Generator,
    num_parts: int = 1,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[Rollout]:
    """Draw the noise of a whole batch; return this process's rows of each part of `split`.

    prompt, exits: [B] of the whole batch; shape: of one row's latents.
    on_device: a generator on the device; noise is drawn as `sample_few_step` draws it.
    """

    def draw(rows: int) -> list[Tensor]:
        device = on_device.device
        noise = torch.randn(rows, *shape, generator=on_device, device=device)
        return split(noise, num_parts, processes)

    noise = draw(len(exits))
    fresh = [draw(int((exits > step).sum())) for step in range(int(exits[0]))]
    own_prompt, own_exits = (split(rows, num_parts, processes) for rows in (prompt, exits))
    return [
        Rollout(
            prompt=own_prompt[part],
            exits=own_exits[part],
            noise=noise[part],
            # The first row of a part, in the first process, leaves last.
            fresh=[each[part] for each in fresh[: int(exits[part * processes.size])]],
        )
        for part in range(num_parts)
    ]


def split(whole: Tensor, num_parts: int, processes: ProcessGroup) -> list[Tensor]:
    """Return this process's rows of a batch [B, ...] in parts: every `num_parts`-th of them."""
    own = processes.share(whole)
    return [own[part::num_parts] for part in range(num_parts)]


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


def draw_score_sigma(num_samples: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw the noise levels [num_samples] at which scores are compared, on the generator's device.

    Uniform, warped as sampling is, clamped to [0.02, 0.98].
    """
    uniform = torch.rand(num_samples, generator=generator, device=generator.device)
    return shift_sigmas(uniform, shift).clamp(*_SIGMA_RANGE)


def distribution_push(
    x0: Tensor, noisy: Tensor, sigma: Tensor, real_velocity: Tensor, fake_velocity: Tensor
) -> Tensor:
    """Return the normalised direction in which KL(q || p) grows at x0 (DMD2 eq. 1, DMD eq. 8).

    `(x0_fake - x0_real) / mean |x0 - x0_real|`, which is the difference of the scores times
    `t^2 / (1 - t)` and a positive number a sample.

    x0, noisy, both velocities: [B, ...]; noisy is x0 at noise level sigma [B].

    Returns [B, ...], without a gradient.
    """
    with torch.no_grad():
        difference = expand(sigma, noisy) * (real_velocity - fake_velocity)
        real_x0 = velocity_to_x0(noisy, real_velocity, sigma)
        distance = (x0 - real_x0).abs().flatten(1).mean(dim=1)
        return difference / expand(distance.clamp_min(_TINY), noisy)


def generator_loss(x0: Tensor, push: Tensor) -> Tensor:
    """Return a scalar whose gradient at x0 [B, ...] is push [B, ...] over its number of elements.

    `|x0 - stop(x0 - push)|^2 / 2`: its value is half the push's mean square, which falls as fake
    and real scores come to agree.
    """
    target = (x0 - push).detach().float()
    return 0.5 * (x0.float() - target).square().mean()


def regression_loss(x0: Tensor, ending: Tensor) -> Tensor:
    """Return `mean |x0 - ending|`, to the video [B, ...] that the teacher makes of the same state.

    It keeps what the push alone forgets: that every noise has a video of its own (DMD eq. 9, with
    the distance in latents).
    """
    return (x0.float() - ending.float()).abs().mean()


def motion_loss(own: Tensor, whole: Tensor) -> Tensor:
    """Return `log(whole)^2`, which is 0 where videos move as much as the teacher's.

    own: motion of a part of a batch over the teacher's, a scalar. whole: that of all of the batch,
        the mean over its parts, without a gradient. The mean over the parts of this loss has the
        gradient of `log(mean of own)^2`, although no part knows the others'.
    """
    return whole.log().square() + 2 * whole.log() / whole * (own - own.detach())


def critic_loss(fake_velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss `|u_fake - (noise - x0)|^2` on the generator's own videos.

    fake_velocity: [B, ...], at x0 under noise [B, ...]; no gradient flows into x0.
    """
    return (fake_velocity.float() - (noise - x0.detach()).float()).square().mean()
