"""Sample videos by the teacher and keep some of the states that each goes through.

What is random of a video (prompt, noise, which states are kept) is drawn from (seed, its number)
alone: it is the same whatever is sampled together with it, up to rounding.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import sample_euler
from ..models.velocity import bind_guided
from .teacher import Teacher

KEPT = ("latents", "conditional", "unconditional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How videos are sampled: noise levels [steps + 1], guidance, states kept of each video."""

    sigmas: Tensor
    guidance_scale: float
    num_kept: int
    seed: int
    precision: str

    @property
    def num_steps(self) -> int:
        """The sampler's steps."""
        return len(self.sigmas) - 1


@torch.no_grad()
def sample_videos(
    teacher: Teacher, sampling: Sampling, videos: range, on_step: Callable[[int], None]
) -> dict[str, Tensor]:
    """Sample videos together; `on_step` is called before each of the sampler's steps.

    Returns state and both branches' velocities [videos, kept, C, F, H, W] fp16, the step
    [videos, kept] that each is of, and the index [videos] of the prompt.
    """
    device = teacher.prompt_embeds.device
    drawn = [_draw_video(teacher, sampling, video) for video in videos]
    prompt, noise, kept_steps = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    kept: dict[str, list[Tensor]] = {name: [] for name in KEPT}
    branches: list[Tensor] = []

    def on_branches(conditional: Tensor, unconditional: Tensor) -> None:
        branches[:] = conditional, unconditional

    def keep(step: int, latents: Tensor, velocity: Tensor) -> None:
        on_step(step)
        rows = (kept_steps == step).any(dim=1).nonzero().squeeze(1)
        for name, tensor in zip(kept, (latents, *branches), strict=True):
            kept[name].append(tensor[rows.to(device)].half().cpu())
        order.append(rows)

    order: list[Tensor] = []
    velocity_fn = bind_guided(
        teacher.model,
        teacher.prompt_embeds[prompt.to(device)],
        teacher.negative_embeds.expand(len(videos), -1, -1),
        sampling.guidance_scale,
        precision=sampling.precision,
        on_branches=on_branches,
    )
    sample_euler(velocity_fn, noise.to(device), sampling.sigmas, on_step=keep)
    # States arrive step by step; a stable sort by video brings each video's together, in order.
    by_video = torch.cat(order).argsort(stable=True)
    shape = kept_steps.shape
    stored = {name: torch.cat(parts)[by_video].unflatten(0, shape) for name, parts in kept.items()}
    return {**stored, "step": kept_steps, "prompt": prompt}


def spread_edges(num_kept: int, num_steps: int) -> Tensor:
    """Return where the strata begin and end of which one step each is kept, [num_kept + 1]."""
    return torch.linspace(0, num_steps, num_kept + 1).round().long()


def _draw_video(teacher: Teacher, sampling: Sampling, video: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a video's prompt [], noise [C, F, H, W] and the steps [kept] that are kept of it."""
    generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + video)
    prompt = torch.randint(len(teacher.prompts), (), generator=generator)
    noise = torch.randn(teacher.latent_shape, generator=generator)
    return prompt, noise, _spread(sampling.num_kept, sampling.num_steps, generator)


def _spread(num_kept: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Pick `num_kept` of `num_steps`, one in each of as many equal strata."""
    edges = spread_edges(num_kept, num_steps)
    widths = edges[1:] - edges[:-1]
    return edges[:-1] + (torch.rand(num_kept, generator=generator) * widths).long()
