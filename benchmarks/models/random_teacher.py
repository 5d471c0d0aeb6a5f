"""What a training step is measured on: a teacher of random weights, prompts and states."""

from pathlib import Path

import torch

from linvideo_core.models.config import FrozenConfig
from linvideo_core.run.files import write_tensors
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories

from .random_weights import make_held_wan
from .sizes import GUIDANCE_SCALE, VIDEO_STEPS, Size

_NUM_STATES, _NUM_PROMPTS = 8, 4


def make_random_subject(
    size: Size, device: str, frozen_weights: FrozenConfig, seed: int
) -> Teacher:
    """Return a frozen teacher of random weights with random prompts, on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (_NUM_PROMPTS + 1, size.prompt_tokens, size.config.text_dim)
    embeds = torch.randn(shape, generator=generator, device=device)
    teacher = Teacher(
        name=f"random {size.model}",
        model=make_held_wan(size, torch.device(device), frozen_weights, seed),
        prompts=[f"prompt {i}" for i in range(_NUM_PROMPTS)],
        prompt_embeds=embeds[:-1],
        negative_embeds=embeds[-1],
        latent_shape=size.latent_shape,
        decode=lambda latents: latents.mean(dim=1),
        is_demo=False,
        offload_blocks=frozen_weights.offload_blocks,
    )
    return teacher.to(device)


def draw_states(size: Size, path: Path, seed: int) -> Trajectories:
    """Write a shard of random states and open it, as a teacher's."""
    config = TrajectoryConfig(
        num_trajectories=1,
        states_per_trajectory=_NUM_STATES,
        sampler_steps=VIDEO_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        shift=size.shift,
    )
    generator = torch.Generator().manual_seed(seed)
    shape = (1, _NUM_STATES, *size.latent_shape)
    states = {
        name: torch.randn(shape, generator=generator).half()
        for name in ("latents", "conditional", "unconditional")
    }
    step = torch.linspace(0, VIDEO_STEPS - 1, _NUM_STATES).long().unsqueeze(0)
    write_tensors(path, {**states, "step": step, "prompt": torch.zeros(1, dtype=torch.int64)})
    return Trajectories([path], config)
