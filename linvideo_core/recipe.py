"""How one model of a comparison is sampled: all steps with guidance, or a distilled one's few."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .few_step import sample_few_step
from .flow import VelocityFn, sample_euler

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
