"""Distribution matching distillation (DMD2, arXiv 2405.14867): losses as functions of velocities.

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

import torch
from torch import Tensor

from ..flow import expand, shift_sigmas, velocity_to_x0

_SIGMA_RANGE = (0.02, 0.98)
"""Timesteps 20 to 980: below, scores explode; above, both are the same."""
_TINY = 1e-6


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


def critic_loss(fake_velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss `|u_fake - (noise - x0)|^2` on the generator's own videos.

    fake_velocity: [B, ...], at x0 under noise [B, ...]; no gradient flows into x0.
    """
    return (fake_velocity.float() - (noise - x0.detach()).float()).square().mean()
