"""Prompts and noise of a comparison, which no training has seen, and what the prompts ask for."""

import logging

import torch
from torch import Tensor

from .demo.prompts import parse_prompt

logger = logging.getLogger(__name__)

# Trajectories and training count their seeds up from the user's: noise and prompts of a comparison
# must be none of theirs. PyTorch's CPU generator heeds the lower 32 bits alone.
_HELD_OUT_SEED = 0x7E57_0000


def draw_prompts(num_prompts: int, num_samples: int, seed: int, *, repeats: int = 1) -> list[int]:
    """Return the prompt of each sample: all of them in random order, then all of them again.

    repeats: how many samples in a row have one prompt.
    """
    generator = torch.Generator().manual_seed(_HELD_OUT_SEED + seed)
    rounds = -(-num_samples // (num_prompts * repeats))
    order = [torch.randperm(num_prompts, generator=generator) for _ in range(rounds)]
    return torch.cat(order).repeat_interleave(repeats)[:num_samples].tolist()


def draw_noise(latent_shape: tuple[int, int, int, int], num_samples: int, seed: int) -> Tensor:
    """Return noise [num_samples, C, F, H, W] on the CPU, each sample's the same at any number."""
    generator = torch.Generator().manual_seed(_HELD_OUT_SEED + seed)
    return torch.stack([torch.randn(latent_shape, generator=generator) for _ in range(num_samples)])


def read_labels(prompts: list[str]) -> tuple[Tensor, Tensor] | None:
    """Return digits and directions [B] that prompts ask for, or None where one does not say."""
    try:
        digits, directions = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    except ValueError as error:
        logger.warning("digit and motion accuracy are left out: %s", error)
        return None
    return digits, directions
