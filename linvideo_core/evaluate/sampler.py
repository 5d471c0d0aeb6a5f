"""Sampling for a comparison: every model gets the same prompts, noise, noise levels and judge."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..demo.classifier import Judge, load_judge
from ..demo.prompts import parse_prompt
from ..flow import Recipe, VelocityFn, bind_guided, make_sigmas
from ..models.attention import LinearAttention
from ..models.attention_sites import attention_at, shapes_of
from ..models.experts import parts_of
from ..models.families import identify
from ..run.callbacks import Callbacks
from ..teacher.teacher import Teacher
from . import metrics
from .config import CompareConfig
from .features import teacher_features

logger = logging.getLogger(__name__)

NUM_SHOWN = 4

# Training counts its seeds up from the user's; a comparison's start far away from them. PyTorch's
# CPU generator uses the lower 32 bits alone.
_SEED = 0x7E57_0000
# Features are taken under noise that no sample was made from.
_FEATURE_SEED = 0x1_0000
_NUM_STATE_SAMPLES, _NUM_STATE_LEVELS = 32, 10
_TENSORS = ("latents", "frames", "features", "digit_logits", "motion_logits")

Row = dict[str, Any]


def draw_prompts(num_prompts: int, num_samples: int, seed: int, *, repeats: int = 1) -> list[int]:
    """Return the prompt of each sample: all of them in random order, then all of them again.

    repeats: how many samples in a row have one prompt.
    """
    generator = torch.Generator().manual_seed(_SEED + seed)
    rounds = -(-num_samples // (num_prompts * repeats))
    order = [torch.randperm(num_prompts, generator=generator) for _ in range(rounds)]
    return torch.cat(order).repeat_interleave(repeats)[:num_samples].tolist()


def draw_noise(latent_shape: tuple[int, int, int, int], num_samples: int, seed: int) -> Tensor:
    """Return noise [num_samples, C, F, H, W] on the CPU, each sample's the same at any number."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.stack([torch.randn(latent_shape, generator=generator) for _ in range(num_samples)])


def read_labels(prompts: list[str]) -> tuple[Tensor, Tensor] | None:
    """Return digits and directions [B] that prompts ask for, or None where one does not say."""
    try:
        digits, directions = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    except ValueError as error:
        logger.warning("digit and motion accuracy are left out: %s", error)
        return None
    return digits, directions


@dataclasses.dataclass(kw_only=True)
class Samples:
    """What one model made, on the CPU: latents, frames, what the judge sees in them, time.

    counts: the model's linear layers and all its layers. steps: of the sampler.
    teacher_features: once `Evaluator.describe` was called.
    """

    model: str
    counts: tuple[int, int]
    steps: int
    latents: Tensor
    frames: Tensor
    features: Tensor
    digit_logits: Tensor | None
    motion_logits: Tensor | None
    seconds: float
    teacher_features: Tensor | None = None

    @functools.cached_property
    def video_statistics(self) -> metrics.VideoStatistics | None:
        """What is measured of the frames alone, once."""
        return metrics.summarize_videos(self.frames)


class Evaluator:
    """Samples and measures models under the conditions that all of them share."""

    def __init__(
        self,
        teacher: Teacher,
        settings: CompareConfig,
        *,
        seed: int,
        precision: str,
        callbacks: Callbacks,
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.seed = seed
        self.precision = precision
        self.callbacks = callbacks
        self.device = teacher.prompt_embeds.device
        self.sigmas = make_sigmas(settings.sampler_steps, settings.shift)
        self.prompt_index = draw_prompts(
            len(teacher.prompts), settings.num_samples, seed, repeats=settings.seeds_per_prompt
        )
        self.prompts = [teacher.prompts[i] for i in self.prompt_index]
        self.noise = draw_noise(teacher.latent_shape, settings.num_samples, seed)
        self.judge: Judge | None = load_judge(self.device) if teacher.is_demo else None
        self.labels = read_labels(self.prompts) if teacher.is_demo else None
        levels = torch.linspace(
            0, settings.sampler_steps - 1, min(_NUM_STATE_LEVELS, settings.sampler_steps)
        )
        self.levels = levels.round().long().tolist()
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def bind(self, model: nn.Module, part: slice, guidance_scale: float) -> VelocityFn:
        """Return the guided velocity function of a model for some of the samples."""
        embeds = self.teacher.prompt_embeds[self.prompt_index[part]]
        negative = self.teacher.negative_embeds.expand_as(embeds)
        return bind_guided(model, embeds, negative, guidance_scale, precision=self.precision)

    def sample(
        self,
        name: str,
        model: nn.Module,
        *,
        is_teacher: bool = False,
        recipe: Recipe | None = None,
    ) -> Samples:
        """Sample all prompts; the teacher's states in the first batch are kept.

        recipe: none: as the settings say, by Euler with guidance.
        """
        if recipe is None:
            recipe = Recipe(sigmas=self.sigmas, guidance_scale=self.settings.guidance_scale)
        count, size, steps = self.settings.num_samples, self.settings.batch_size, len(recipe.sigmas)
        batches, total = [], 0.0
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            if start == 0:
                self.callbacks.on_stage("evaluation", -(-count // size) * (steps - 1), detail=name)
            on_step = self._watch(part, steps - 1, keep=is_teacher and start == 0)
            velocity_fn = self.bind(model, part, recipe.guidance_scale)
            noise = self.noise[part].to(self.device)
            if start == 0:
                # The first call compiles and tunes kernels: that is not the model's own time.
                with torch.no_grad():
                    velocity_fn(noise, self.sigmas[:1].to(self.device).expand(len(noise)))
            started = self._clock()
            latents = recipe.sample(velocity_fn, noise, seed=self.seed + start, on_step=on_step)
            total += self._clock() - started
            batches.append(self._judge(latents))
        columns = dict(zip(_TENSORS, zip(*batches, strict=True), strict=True))
        joined = {k: None if t[0] is None else torch.cat(t) for k, t in columns.items()}
        counts = count_linear_layers(model)
        return Samples(model=name, counts=counts, steps=steps - 1, seconds=total, **joined)

    def describe(self, samples: Samples) -> None:
        """Add the teacher's features of the samples.

        Raises ValueError inside of a student's context, where the teacher is changed.
        """
        count, size = len(samples.latents), self.settings.batch_size
        noise = draw_noise(self.teacher.latent_shape, count, _FEATURE_SEED + self.seed)
        model, embeds = self.teacher.model, self.teacher.negative_embeds
        found = []
        for part in zip(samples.latents.split(size), noise.split(size), strict=True):
            latents, noised = (x.to(self.device) for x in part)
            features = teacher_features(model, latents, noised, embeds, precision=self.precision)
            found.append(features.cpu())
        samples.teacher_features = torch.cat(found)

    def compare_velocities(self, name: str, model: nn.Module) -> list[Row]:
        """Compare a student's velocity with the teacher's at the kept states."""
        states, references = (torch.stack(part) for part in zip(*self.states.values(), strict=True))
        sigmas = self.sigmas[list(self.states)]
        velocity_fn = self.bind(model, slice(0, states.shape[1]), self.settings.guidance_scale)
        errors, cosines = metrics.velocity_error_by_sigma(velocity_fn, states, references, sigmas)
        columns = (x.tolist() for x in (sigmas, errors.mean(dim=1), cosines.mean(dim=1)))
        return [
            {"model": name, "sigma": sigma, "velocity_error": error, "velocity_cosine": cosine}
            for sigma, error, cosine in zip(*columns, strict=True)
        ]

    def measure(self, samples: Samples, teacher: Samples, velocity_rows: list[Row] | None) -> Row:
        """Return the row of one model.

        velocity_rows: none for the teacher itself, and for models that are not sampled along its
            trajectories.

        With a judge `digit` and `motion` are the fractions of samples that show what their prompt
        asks for, and `frechet` is the distance to real clips.
        """
        row: Row = {"model": samples.model}
        row["linear_layers"], row["layers"] = samples.counts
        if self.labels is not None:
            digits, directions = self.labels
            row["digit"] = metrics.accuracy(samples.digit_logits, digits)
            row["motion"] = metrics.accuracy(samples.motion_logits, directions)
        own, others = (metrics.feature_statistics(x.features) for x in (samples, teacher))
        if self.judge is not None:
            row["frechet"] = metrics.frechet_distance(
                *own, self.judge.real_mean, self.judge.real_cov
            )
        row["seconds"] = samples.seconds
        row["steps"] = samples.steps
        row["seconds_per_video"] = samples.seconds / len(samples.latents)
        row["frechet_to_teacher"] = (
            0.0 if samples is teacher else metrics.frechet_distance(*own, *others)
        )
        if samples.teacher_features is not None and teacher.teacher_features is not None:
            row["frechet_teacher_features"] = metrics.frechet_distance_of(
                samples.teacher_features, teacher.teacher_features
            )
        distance = metrics.sample_distance(samples.latents, teacher.latents)
        row["distance_to_teacher"] = distance.mean().item()
        row |= metrics.compare_videos(samples.video_statistics, teacher.video_statistics)
        variety = [metrics.diversity(x.latents, self.prompt_index) for x in (samples, teacher)]
        row["diversity"] = metrics.ratio(*variety)
        for key, perfect in (("velocity_error", 0.0), ("velocity_cosine", 1.0)):
            if velocity_rows:
                row[key] = sum(r[key] for r in velocity_rows) / len(velocity_rows)
            elif samples is teacher:
                row[key] = perfect
        return row

    def _watch(
        self, part: slice, steps: int, *, keep: bool
    ) -> Callable[[int, Tensor, Tensor], None]:
        batches_before = part.start // self.settings.batch_size

        def on_step(i: int, latents: Tensor, velocity: Tensor) -> None:
            if keep and i in self.levels:
                few = slice(0, _NUM_STATE_SAMPLES)
                self.states[i] = (latents[few].clone(), velocity[few].clone())
            self.callbacks.on_step_end(batches_before * steps + i + 1)

        return on_step

    @torch.no_grad()
    def _judge(self, latents: Tensor) -> tuple[Tensor | None, ...]:
        """Return a batch's part of each of `_TENSORS`."""
        frames = self.teacher.decode(latents).float()
        if self.judge is None:
            return latents.cpu(), frames.cpu(), metrics.latent_features(latents).cpu(), None, None
        digit_logits, motion_logits, features = (x.cpu() for x in self.judge(frames))
        return latents.cpu(), frames.cpu(), features, digit_logits, motion_logits

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def count_linear_layers(model: nn.Module) -> tuple[int, int]:
    """Return how many self-attention layers are linear, and how many there are."""
    kinds = [
        isinstance(attention_at(part, site), LinearAttention)
        for part in parts_of(model)
        for site in identify(shapes_of(part))[1]
    ]
    return sum(kinds), len(kinds)
