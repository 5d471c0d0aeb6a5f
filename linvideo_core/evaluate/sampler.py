"""The bench of a comparison: one set of prompts, noise, noise levels and one judge for all models.

Each model samples on it; what it made is measured against what the teacher made.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT, DEMO_STEPS
from ..demo.classifier import Judge, load_judge
from ..demo.prompts import parse_prompt
from ..flow import Recipe, VelocityFn, make_sigmas
from ..models.attention import LinearAttention
from ..models.attention_sites import attention_at, shapes_of
from ..models.experts import parts_of
from ..models.families import identify
from ..models.velocity import bind_guided
from ..run.callbacks import Callbacks
from ..run.config import option, positive
from ..teacher.teacher import Teacher
from . import metrics
from .features import teacher_features
from .metrics import VideoStatistics, compare_videos, ratio, summarize_videos

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


logger = logging.getLogger(__name__)

NUM_SHOWN = 4

# Features are taken under noise that no sample was made from.
_FEATURE_SEED = 0x1_0000
_NUM_STATE_SAMPLES, _NUM_STATE_LEVELS = 32, 10

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """How the models are sampled."""

    num_samples: int = option(20, "videos that each model samples")
    seeds_per_prompt: int = option(1, "videos in a row of one prompt: 2 or more show diversity")
    steps: int = option(DEMO_STEPS, "Euler steps")
    guidance_scale: float = option(DEMO_GUIDANCE_SCALE, "classifier-free guidance")
    shift: float = option(DEMO_SHIFT, "warp of the noise levels: Wan takes 3 for 480p, 5 for 720p")
    batch_size: int = option(10, "videos sampled together")

    def __post_init__(self) -> None:
        positive(self, "seeds_per_prompt", "steps", "shift", "batch_size")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples {self.num_samples} given; 2 or more are needed")


@dataclasses.dataclass(kw_only=True)
class Samples:
    """What one model made, on the CPU: latents, frames, what the judge sees in them, time.

    counts: the model's linear layers and all its layers. steps: of the sampler.
    teacher_features: once `Bench.describe` has looked.
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
    def videos(self) -> VideoStatistics | None:
        """What is measured of the frames alone, once."""
        return summarize_videos(self.frames)


class Evaluator:
    """What all models share: prompts, noise, noise levels, the judge, the teacher's states."""

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
        self.sigmas = make_sigmas(settings.steps, settings.shift)
        repeats = settings.seeds_per_prompt
        self.prompt_index = draw_prompts(
            len(teacher.prompts), settings.num_samples, seed, repeats=repeats
        )
        self.prompts = [teacher.prompts[i] for i in self.prompt_index]
        self.noise = draw_noise(teacher.latent_shape, settings.num_samples, seed)
        self.judge: Judge | None = load_judge(self.device) if teacher.is_demo else None
        self.labels = read_labels(self.prompts) if teacher.is_demo else None
        levels = torch.linspace(0, settings.steps - 1, min(_NUM_STATE_LEVELS, settings.steps))
        self.levels = levels.round().long().tolist()
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def bind(
        self, model: nn.Module, part: slice, guidance_scale: float | None = None
    ) -> VelocityFn:
        """Return the guided velocity function of a model for some of the samples."""
        if guidance_scale is None:
            guidance_scale = self.settings.guidance_scale
        prompt_embeds = self.teacher.prompt_embeds[self.prompt_index[part]]
        return bind_guided(
            model,
            prompt_embeds,
            self.teacher.negative_embeds.expand_as(prompt_embeds),
            guidance_scale,
            precision=self.precision,
        )

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
        count, size = self.settings.num_samples, self.settings.batch_size
        counts = count_linear_layers(model)
        made: list[Samples] = []
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            steps = len(recipe.sigmas) - 1
            if start == 0:
                self.callbacks.on_stage("evaluation", -(-count // size) * steps, detail=name)
            on_step = self._watch(part, steps, keep=is_teacher and start == 0)
            velocity_fn = self.bind(model, part, recipe.guidance_scale)
            noise = self.noise[part].to(self.device)
            if start == 0:
                # The first call compiles and tunes kernels: that is not the model's own time.
                with torch.no_grad():
                    velocity_fn(noise, self.sigmas[:1].to(self.device).expand(len(noise)))
            started = self._clock()
            latents = recipe.sample(velocity_fn, noise, seed=self.seed + start, on_step=on_step)
            seconds = self._clock() - started
            judged = self._judge(latents)
            made.append(Samples(model=name, counts=counts, steps=steps, seconds=seconds, **judged))
        return _join(made)

    def describe(self, samples: Samples) -> None:
        """Add the teacher's features of the samples; the teacher's model is the teacher now.

        Raises ValueError where it is not: inside of a student's context.
        """
        count, size = len(samples.latents), self.settings.batch_size
        noise = draw_noise(self.teacher.latent_shape, count, _FEATURE_SEED + self.seed)
        parts = zip(samples.latents.split(size), noise.split(size), strict=True)
        samples.teacher_features = torch.cat(
            [
                teacher_features(
                    self.teacher.model,
                    *(x.to(self.device) for x in part),
                    self.teacher.negative_embeds,
                    precision=self.precision,
                ).cpu()
                for part in parts
            ]
        )

    def compare_velocities(self, name: str, model: nn.Module) -> list[Row]:
        """Compare a student's velocity with the teacher's at the kept states."""
        states, references = (torch.stack(part) for part in zip(*self.states.values(), strict=True))
        sigmas = self.sigmas[list(self.states)]
        velocity_fn = self.bind(model, slice(0, states.shape[1]))
        errors, cosines = metrics.velocity_error_by_sigma(velocity_fn, states, references, sigmas)
        columns = (x.tolist() for x in (sigmas, errors.mean(dim=1), cosines.mean(dim=1)))
        return [
            {"model": name, "sigma": sigma, "velocity_error": error, "velocity_cosine": cosine}
            for sigma, error, cosine in zip(*columns, strict=True)
        ]

    def measure(self, samples: Samples, teacher: Samples, velocity_rows: list[Row] | None) -> Row:
        """Return the row of one model.

        velocity_rows: none where velocities are no measure: of the teacher itself, and of models
            that are not sampled along its trajectories.

        With a judge `digit` and `motion` are the fractions of samples that show what their prompt
        asks for, and `frechet` is the distance to real clips. `frechet_teacher_features` is there
        once both have been described.
        """
        linear_layers, layers = samples.counts
        row: Row = {"model": samples.model, "linear_layers": linear_layers, "layers": layers}
        statistics = metrics.feature_statistics(samples.features)
        if self.labels is not None:
            digits, directions = self.labels
            row["digit"] = metrics.accuracy(samples.digit_logits, digits)
            row["motion"] = metrics.accuracy(samples.motion_logits, directions)
        if self.judge is not None:
            real = (self.judge.real_mean, self.judge.real_cov)
            row["frechet"] = metrics.frechet_distance(*statistics, *real)
        row["seconds"] = samples.seconds
        row["steps"] = samples.steps
        row["seconds_per_video"] = samples.seconds / len(samples.latents)
        of_teacher = metrics.feature_statistics(teacher.features)
        row["frechet_to_teacher"] = (
            0.0 if samples is teacher else metrics.frechet_distance(*statistics, *of_teacher)
        )
        if samples.teacher_features is not None and teacher.teacher_features is not None:
            row["frechet_teacher_features"] = metrics.frechet_distance_of(
                samples.teacher_features, teacher.teacher_features
            )
        distance = metrics.sample_distance(samples.latents, teacher.latents)
        row["distance_to_teacher"] = distance.mean().item()
        row |= compare_videos(samples.videos, teacher.videos)
        variety, of_teacher = (
            metrics.diversity(x.latents, self.prompt_index) for x in (samples, teacher)
        )
        row["diversity"] = ratio(variety, of_teacher)
        if velocity_rows or samples is teacher:
            for key, perfect in (("velocity_error", 0.0), ("velocity_cosine", 1.0)):
                values = [r[key] for r in velocity_rows] if velocity_rows else [perfect]
                row[key] = sum(values) / len(values)
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
    def _judge(self, latents: Tensor) -> dict[str, Tensor | None]:
        frames = self.teacher.decode(latents).float()
        if self.judge is None:
            digit_logits = motion_logits = None
            features = metrics.latent_features(latents)
        else:
            digit_logits, motion_logits, features = (x.cpu() for x in self.judge(frames))
        return {
            "latents": latents.cpu(),
            "frames": frames.cpu(),
            "features": features.cpu(),
            "digit_logits": digit_logits,
            "motion_logits": motion_logits,
        }

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


def _join(parts: list[Samples]) -> Samples:
    def cat(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("latents", "frames", "features", "digit_logits", "motion_logits")
    tensors = {name: cat(name) for name in names}
    return dataclasses.replace(parts[0], **tensors, seconds=sum(part.seconds for part in parts))
