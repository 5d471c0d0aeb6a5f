"""Rectified flow: noise levels, noising, conversions, a model's velocity, guidance, samplers.

`sigma` (t in the papers) is the noise level in [0, 1]: `x_t = (1 - t) x0 + t noise`. The network
predicts the velocity `u = noise - x0`. Every conversion of the project lives here, once.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""`(latents [B, C, F, H, W], sigma [B]) -> velocity`, prompts and guidance already bound."""

TIMESTEP_SCALE = 1000.0


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """View sigma [B] as [B, 1, ...] so that it broadcasts over `like` [B, ...]."""
    return sigma.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Warp noise levels of any shape, in [0, 1]: `shift s / (1 + (shift - 1) s)` (Wan, SD3)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_sigmas(steps: int, shift: float) -> Tensor:
    """Return the sampling grid [steps + 1] fp32, falling from 1 to 0, uniform before the warp."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return `x_t = (1 - t) x0 + t noise` for x0, noise [B, ...] and sigma [B]."""
    t = expand(sigma, x0)
    return (1 - t) * x0 + t * noise


def velocity_to_x0(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean estimate `x0 = x_t - t u` of latents, velocity [B, ...] at sigma [B]."""
    return latents - expand(sigma, latents) * velocity


def velocity_to_score(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return `grad log p_t(x_t) = -(x_t + (1 - t) u) / t`; infinite at sigma 0.

    latents, velocity: [B, ...]; sigma: [B].
    """
    t = expand(sigma, latents)
    return -(latents + (1 - t) * velocity) / t


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Move along the flow from sigma [B] to sigma_next [B]: `x_s = x_t + (s - t) u`."""
    return latents + expand(sigma_next - sigma, latents) * velocity


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Combine the velocities [B, ...] of both guidance branches; scale 1 is the conditional one."""
    return unconditional + guidance_scale * (conditional - unconditional)


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a model's matrix products run at `precision`."""
    enabled = precision == "bf16"
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled)


def bind(model: nn.Module, prompt_embeds: Tensor, *, precision: str = "fp32") -> VelocityFn:
    """Return the velocity function of one guidance branch.

    prompt_embeds: [B, S, T], one prompt a sample.
    """

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        with autocast(latents.device, precision):
            return model(latents, TIMESTEP_SCALE * sigma, prompt_embeds)

    return velocity


def bind_guided(
    model: nn.Module,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    guidance_scale: float,
    *,
    precision: str = "fp32",
    on_branches: Callable[[Tensor, Tensor], None] | None = None,
) -> VelocityFn:
    """Return the velocity function of classifier-free guidance, both branches in one call.

    prompt_embeds, negative_embeds: [B, S, T].
    guidance_scale: 1 computes the conditional branch alone.
    on_branches: called with (conditional, unconditional) velocities, for recording.
    """
    if guidance_scale == 1 and on_branches is None:
        return bind(model, prompt_embeds, precision=precision)
    both = bind(model, torch.cat([prompt_embeds, negative_embeds]), precision=precision)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        branches = both(torch.cat([latents, latents]), torch.cat([sigma, sigma]))
        conditional, unconditional = branches.chunk(2)
        if on_branches is not None:
            on_branches(conditional, unconditional)
        return guide(conditional, unconditional, guidance_scale)

    return velocity


@torch.no_grad()
def sample_euler(
    velocity_fn: VelocityFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Integrate the flow from `noise` [B, C, F, H, W] down the grid `sigmas` [steps + 1].

    on_step: called before each step with (step index, latents, velocity), for recording and
        progress.

    Returns the latents at the last sigma.
    """
    latents = noise
    sigmas = sigmas.to(noise.device)
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = (s.expand(noise.shape[0]) for s in (sigmas[i], sigmas[i + 1]))
        velocity = velocity_fn(latents, sigma)
        if on_step is not None:
            on_step(i, latents, velocity)
        latents = euler_step(latents, velocity, sigma, sigma_next)
    return latents


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


_RENOISE_SEED = 0x7E58_0000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is sampled.

    sigmas: [steps + 1], falling to 0; is_few_step: by prediction and fresh noise, not by Euler.
    guidance_scale: 1 for a model that has its guidance baked in.
    """

    sigmas: Tensor
    guidance_scale: float
    is_few_step: bool = False

    def sample(
        self,
        velocity_fn: VelocityFn,
        noise: Tensor,
        *,
        seed: int,
        on_step: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Return the latents [B, ...] that noise [B, ...] becomes; seed: of the renoising."""
        if not self.is_few_step:
            return sample_euler(velocity_fn, noise, self.sigmas, on_step=on_step)
        generator = torch.Generator().manual_seed(_RENOISE_SEED + seed)
        return sample_few_step(
            velocity_fn, noise, self.sigmas, generator=generator, on_step=on_step
        )
