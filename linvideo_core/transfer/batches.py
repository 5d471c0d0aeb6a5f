"""Turn stored states into training batches: each sample trains one guidance branch."""

import dataclasses

import torch
from torch import Tensor

from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from .objectives import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedBatch:
    """A batch with the prompts that its velocity functions are bound to.

    branch_embeds: [B, S, T], the prompt of each sample's own branch.
    prompt_embeds, negative_embeds: [B, S, T], both branches, for guidance.
    """

    batch: Batch
    branch_embeds: Tensor
    prompt_embeds: Tensor
    negative_embeds: Tensor


def draw_batch(
    teacher: Teacher,
    trajectories: Trajectories,
    batch_size: int,
    prompt_dropout: float,
    generator: torch.Generator,
    processes: ProcessGroup = SINGLE_PROCESS,
    weights: Tensor | None = None,
) -> PromptedBatch:
    """Draw stored states and assign a share `prompt_dropout` of them to the unconditional branch.

    batch_size: of the whole process group, whose every process draws all and keeps its share.
    weights: of the stored states, as `Trajectories.draw` takes them.

    Sampling calls both branches, so both are trained: guidance multiplies the error of either.
    """
    device = teacher.prompt_embeds.device
    states = trajectories.draw(batch_size, generator, device, processes, weights)
    is_dropped = processes.share(torch.rand(batch_size, generator=generator) < prompt_dropout).to(
        device
    )
    prompt_embeds = teacher.prompt_embeds[states.prompt]
    negative_embeds = teacher.negative_embeds.expand_as(prompt_embeds)
    velocity = torch.where(
        is_dropped.view(-1, 1, 1, 1, 1), states.unconditional, states.conditional
    )
    return PromptedBatch(
        batch=Batch(
            latents=states.latents, velocity=velocity, step=states.step, processes=processes
        ),
        branch_embeds=torch.where(is_dropped.view(-1, 1, 1), negative_embeds, prompt_embeds),
        prompt_embeds=prompt_embeds,
        negative_embeds=negative_embeds,
    )
