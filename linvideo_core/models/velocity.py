"""Bind a model, prompts and guidance into the velocity function that flow and objectives take."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..flow import VelocityFn, guide

TIMESTEP_SCALE = 1000.0


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
