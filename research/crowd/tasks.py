"""Trainings that only research has: other losses of a student of `crowd`, and another start.

Each is a task of `linvideo_core` that differs from it in this alone; states, warm start and
optimiser are the product's own.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linvideo_core.distill import dmd2
from linvideo_core.distill.task import DistillationTask
from linvideo_core.flow import bind_guided, euler_step, guide, velocity_to_x0
from linvideo_core.models.attention_sites import blocks
from linvideo_core.training.trainer import ParameterGroup
from linvideo_core.transfer.config import SensitivityConfig
from linvideo_core.transfer.layer_selection import rank_layers
from linvideo_core.transfer.objective import Batch
from linvideo_core.transfer.student import TransferTask

# Of layer scores that start from a ranking: as far from their mean, and from 0 and 1.
_START_REACH, _START_MARGIN = 0.25, 0.1


def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Return `mean |u - v|^2` of velocities [B, C, F, H, W], a scalar."""
    return (velocity - target).float().square().mean()


def block_feature_loss(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return the mean over blocks of `|h_student - h_teacher|^2 / |h_teacher|^2`, a scalar.

    own, theirs: every block's output [B, L, N D]; no gradient flows into the teacher's.
    """
    errors = [
        velocity_loss(mine, other) / other.detach().float().square().mean()
        for mine, other in zip(own, map(Tensor.detach, theirs), strict=True)
    ]
    return torch.stack(errors).mean()


@contextlib.contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what modules return, in the order of their calls, while the context lasts."""
    found: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda _, args, output: found.append(output))
            stack.callback(hook.remove)
        yield found


class BlockFeatures(TransferTask):
    """Match the teacher's velocity, and beside it the output of each of its blocks.

    The teacher is asked once more at each state for these; its time counts as the training's.
    """

    def objective_loss(self, batch: Batch) -> Tensor:
        """Return `velocity_loss` plus `block_feature_loss`.

        Raises ValueError for states that the student moves first.
        """
        _check_stays(batch)
        sigma = self.trajectories.sigmas.to(batch.latents.device)[batch.step]
        with recorded(blocks(self.teacher.model, self.student.sites)) as theirs:
            self.teacher_velocity(batch.latents, sigma, batch)
        with recorded(blocks(self.student.model, self.student.sites)) as own:
            velocity = self.student_velocity(batch.latents, sigma, batch)
        return velocity_loss(velocity, batch.velocity) + block_feature_loss(own, theirs)


class GuidedVelocity(TransferTask):
    """Match the teacher's guided velocity by one call with the prompt: sampled without guidance."""

    def objective_loss(self, batch: Batch) -> Tensor:
        """Return `velocity_loss` to `u + scale (c - u)` of the teacher's branches c and u.

        Raises ValueError for rows without a prompt, and for states that the student moves first.
        """
        _check_stays(batch)
        if self.batches.config.prompt_dropout:
            raise ValueError(
                f"prompt_dropout {self.batches.config.prompt_dropout} given; 0 is needed, because "
                "a student without guidance is always called with its prompt"
            )
        sigma = self.trajectories.sigmas.to(batch.latents.device)[batch.step]
        scale = self.trajectories.guidance_scale
        guided = guide(batch.velocity, batch.unconditional, scale)
        return velocity_loss(self.student_velocity(batch.latents, sigma, batch), guided)


class KLPush(TransferTask):
    """Match the teacher's velocity, and push where the student's next step leads to.

    The push is along the difference of the scores (LinVideo eq. 8), normalised as in DMD (eq. 8),
    and acts on the parameters through that step: the gradient of a KL divergence.
    """

    def objective_loss(self, batch: Batch) -> Tensor:
        """Return `velocity_loss` plus `dmd2.generator_loss` of the states after a guided step.

        Of a state whose next step ends at noise level 0, where there is no score, nothing is
        pushed. Raises ValueError for states that the student moves first.
        """
        _check_stays(batch)
        sigmas = self.trajectories.sigmas.to(batch.latents.device)
        start, end = sigmas[batch.step], sigmas[batch.step + 1]
        velocity = self.student_velocity(batch.latents, start, batch)
        prompts = batch.prompt_embeds, batch.negative_embeds
        latents = euler_step(batch.latents, self.guided(batch.latents, start, *prompts), start, end)
        push = self._find_push(latents.detach(), end, *prompts)
        return velocity_loss(velocity, batch.velocity) + dmd2.generator_loss(latents, push)

    @torch.no_grad()
    def _find_push(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, negative_embeds: Tensor
    ) -> Tensor:
        """Return the push [B, C, F, H, W] at latents [B, C, F, H, W] of noise levels sigma [B]."""
        prompts = prompt_embeds, negative_embeds
        fake = self.guided(latents, sigma, *prompts)
        scale, how = self.trajectories.guidance_scale, {"precision": self.precision}
        with self.student.disabled():
            real = bind_guided(self.teacher.model, *prompts, scale, **how)(latents, sigma)
        # 0 at noise level 0: the difference of the clean estimates vanishes there.
        clean = velocity_to_x0(latents, fake, sigma)
        return dmd2.distribution_push(clean, latents, sigma, real, fake)


def _check_stays(batch: Batch) -> None:
    if batch.any_moves:
        raise ValueError(
            "states that the student moves first given; states of a pool, or objective velocity, "
            "are needed"
        )


class FromRanking(TransferTask):
    """Learn which layers become linear, from scores that begin in the order of a ranking."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Take what `TransferTask` takes; rank the layers on stored videos."""
        super().__init__(*args, **settings)
        ranking = rank_layers(
            self.student.model,
            self.student.mixed,
            self.teacher,
            self.trajectories,
            SensitivityConfig(),
            settings["run"],
            self.training.batch_size,
        )
        starts = start_scores(ranking, self.selection.config.target)
        for layer, score in starts.items():
            self.student.mixed[layer].layer_score.data.fill_(score)


def start_scores(ranking: Sequence[int], target: int) -> dict[int, float]:
    """Return the score r that each layer starts from; the sum of 1 - r is `target`.

    They are evenly spaced around their mean, the least sensitive layer lowest, by at most 0.25 and
    within [0.1, 0.9]; alike where the mean itself lies outside.

    ranking: all layers from the least to the most sensitive.
    """
    mean = 1 - target / len(ranking)
    reach = max(0.0, min(_START_REACH, mean - _START_MARGIN, 1 - _START_MARGIN - mean))
    scores = torch.linspace(mean - reach, mean + reach, len(ranking)).tolist()
    return dict(zip(ranking, scores, strict=True))


class Regression(DistillationTask):
    """Predict the teacher's own videos from its states, without a critic."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the student's groups, all of which each step trains."""
        groups = super().parameter_groups()
        return [dataclasses.replace(g, every=1) for g in groups if g.network == "generator"]

    def losses(
        self, step: int, generator: torch.Generator, accumulation: int
    ) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        """Yield `dmd2.regression_loss` of each part of a batch of stored states."""
        picks = self.endpoints.pick(self.training.batch_size * accumulation, generator)
        for part in dmd2.split(picks, accumulation, self.processes):
            device = self.teacher.prompt_embeds.device
            states, sigma, ending = self.endpoints.take(part, device)
            prompt_embeds = self.teacher.prompt_embeds[states.prompt]
            loss = dmd2.regression_loss(self.predict(states.latents, sigma, prompt_embeds), ending)
            yield loss / accumulation, {"regression_loss": loss.detach()}
