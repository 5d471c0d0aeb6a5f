"""Wan 2.2's two experts: one model for high noise and one for low, which share a trajectory."""

import torch
from torch import Tensor, nn

from ..flow import TIMESTEP_SCALE

HIGH, LOW = SIDES = ("high_noise", "low_noise")


def is_high_noise(timesteps: Tensor, boundary: float) -> Tensor:
    """Say where the high-noise expert works: at 1000 boundary and above, as in Wan's sampler.

    timesteps: in [0, 1000].
    """
    return timesteps >= TIMESTEP_SCALE * boundary


class Experts(nn.Module):
    """Both experts as one model; each sample goes to the one whose noise level it has.

    Only the expert at work is on the device of the latents: the other waits on the CPU. Parameters
    of the two are never mixed, and each keeps its own names below `high_noise` or `low_noise`.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, boundary: float) -> None:
        super().__init__()
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.boundary = boundary

    def fetch(self, side: str, device: torch.device | str) -> nn.Module:
        """Return the expert of a side on a device, the other one on the CPU."""
        expert, other = (getattr(self, name) for name in (side, LOW if side == HIGH else HIGH))
        if next(expert.parameters()).device != torch.device(device):
            other.to("cpu")
            expert.to(device)
        return expert

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the velocity, as either expert does: see `WanModel.forward`."""
        is_high = is_high_noise(timesteps, self.boundary)
        velocity = torch.empty_like(latents)
        for side, is_mine in ((HIGH, is_high), (LOW, ~is_high)):
            if is_mine.all():
                return self.fetch(side, latents.device)(latents, timesteps, prompt_embeds)
            if is_mine.any():
                expert = self.fetch(side, latents.device)
                parts = (x[is_mine] for x in (latents, timesteps, prompt_embeds))
                velocity[is_mine] = expert(*parts)
        return velocity


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Return the experts of a model, or the model alone."""
    return [model.high_noise, model.low_noise] if isinstance(model, Experts) else [model]


def expert_at(model: nn.Module, sigma: float) -> nn.Module:
    """Return the part of a model that works at a noise level."""
    if not isinstance(model, Experts):
        return model
    is_high = bool(is_high_noise(torch.tensor(TIMESTEP_SCALE * sigma), model.boundary))
    return model.high_noise if is_high else model.low_noise
