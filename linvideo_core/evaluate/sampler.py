"""Sampling for a comparison: every model gets the same prompts, noise, noise levels and judge."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..demo.classifier import Judge, load_judge
from ..demo.prompts import parse_prompt
from ..flow import Recipe, VelocityFn, add_noise, bind, bind_guided, make_sigmas
from ..models.attention import LinearAttention, MixedAttention
from ..models.attention_sites import attention_at, shapes_of
from ..models.experts import expert_at, parts_of
from ..models.families import identify
from ..run.callbacks import Callbacks
from ..teacher.teacher import Teacher
from . import metrics
from .config import CompareConfig

logger = logging.getLogger(__name__)

NUM_SHOWN = 4

# Training counts its seeds up from the user's; a comparison's start far away from them. PyTorch's
# CPU generator uses the lower 32 bits alone.
_SEED = 0x7E57_0000
# Features are taken under noise that no sample was made from.
_FEATURE_SEED = 0x1_0000
_TIMED_STEPS = 5
_NUM_STATE_SAMPLES, _NUM_STATE_LEVELS = 32, 10
# Enough noise for the model to be at home, little enough for it to see what is there.
FEATURE_SIGMA = 0.25

# Frames a second by channels of the latents, where it is not 16; 48 are those of Wan 2.2's 5B.
_FPS = {48: 24}
_DEMO_FPS = 10

Row = dict[str, Any]


def draw_prompts(num_prompts: int, num_samples: int, seed: int, *, repeats: int = 1) -> list[int]:
    """Return the prompt of each sample: all of them in random order, then all of them again.

    repeats: how many samples in a row have one prompt.
    """
    generator = torch.Generator().manual_seed(_SEED + seed)
    rounds = -(-num_samples // (num_prompts * repeats))
    order = [torch.randperm(num_prompts, generator=generator) for _ in range(rounds)]
    return torch.cat(order).repeat_interleave(repeats)[:num_samples].tolist()


def count_comparing_calls(
    num_samples: int, batch_size: int, sampler_steps: int, *, num_students: int
) -> float:
    """Return what a comparison takes, in calls of the guided teacher for one video.

    Every model samples all videos, after a first call that is not timed; the teacher's features of
    a video take one branch. Of students, velocities are compared at a few noise levels. A few
    calls are timed: the teacher's at first and after each student, whose own are before and after.
    """
    if not num_samples:
        return 0.0
    first = min(num_samples, batch_size)
    velocities = min(first, _NUM_STATE_SAMPLES) * min(sampler_steps, _NUM_STATE_LEVELS)
    sampling = num_samples * (sampler_steps + 0.5) + first
    timed = (1 + 3 * num_students) * (1 + _TIMED_STEPS)
    return sampling + num_students * (sampling + velocities) + timed


def draw_noise(latent_shape: tuple[int, int, int, int], num_samples: int, seed: int) -> Tensor:
    """Return noise [num_samples, C, F, H, W] on the CPU, each sample's the same at any number."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.stack([torch.randn(latent_shape, generator=generator) for _ in range(num_samples)])


def find_fps(teacher: Teacher) -> int:
    """Return at how many frames a second a model's videos play: Wan's own, and the demo's."""
    return _DEMO_FPS if teacher.is_demo else _FPS.get(teacher.latent_shape[0], 16)


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

    counts: of its layers, see `count_layers`. steps: of the sampler.
    frames: of the first NUM_SHOWN videos, uint8, as `Teacher.decode` gives them.
    video_measures: means of `metrics.measure_videos` over all videos.
    teacher_features: once `Evaluator.describe` was called.
    """

    model: str
    counts: dict[str, int]
    steps: int
    latents: Tensor
    frames: Tensor
    features: Tensor
    seconds: float
    video_measures: dict[str, Tensor]
    digit_logits: Tensor | None = None
    motion_logits: Tensor | None = None
    teacher_features: Tensor | None = None


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
        self._usual = Recipe(sigmas=self.sigmas, guidance_scale=settings.guidance_scale)
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
        negative = self.teacher.negatives_for(embeds)
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
        recipe = recipe or self._usual
        count, size = self.settings.num_samples, self.settings.batch_size
        steps, starts = len(recipe.sigmas) - 1, range(0, count, size)
        self.callbacks.on_stage("evaluation", len(starts) * steps, detail=name)
        batches, measured, shown, total = [], [], [], 0.0
        for start in starts:
            part = slice(start, min(start + size, count))
            on_step = self._watch(len(batches) * steps, keep=is_teacher and start == 0)
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
            measured += [self._measure(latent, shown) for latent in latents.split(1)]
        return Samples(
            model=name,
            counts=count_layers(model),
            steps=steps,
            seconds=total,
            frames=torch.cat(shown),
            video_measures={key: x.mean(dim=0) for key, x in _join(measured).items()},
            **_join(batches),
        )

    @torch.no_grad()
    def time_video(self, model: nn.Module, recipe: Recipe | None = None) -> float:
        """Return the seconds of a video, told from a few of its steps, one video at a time.

        recipe: as of `sample`.
        """
        recipe = recipe or self._usual
        velocity_fn = self.bind(model, slice(0, 1), recipe.guidance_scale)
        noise, sigmas = self.noise[:1].to(self.device), recipe.sigmas[:-1].to(self.device)
        # Evenly spread: of sparse layers the first steps may be dense, and take longer.
        picks = [(2 * i + 1) * len(sigmas) // (2 * _TIMED_STEPS) for i in range(_TIMED_STEPS)]
        part, total = None, 0.0
        for sigma in sigmas[picks].split(1):
            if part is not (part := expert_at(model, sigma.item())):
                # It may compile and tune kernels, and two experts take turns on the device.
                velocity_fn(noise, sigma)
            started = self._clock()
            velocity_fn(noise, sigma)
            total += self._clock() - started
        return total / len(picks) * len(sigmas)

    def describe(self, samples: Samples) -> None:
        """Add the teacher's features of the samples.

        Raises ValueError inside of a student's context, where the teacher is changed.
        """
        count, size = len(samples.latents), self.settings.batch_size
        noise = draw_noise(self.teacher.latent_shape, count, _FEATURE_SEED + self.seed)
        model = self.teacher.model
        embeds = self.teacher.negatives_for(self.teacher.prompt_embeds[:1])[0]
        found = []
        for part in zip(samples.latents.split(size), noise.split(size), strict=True):
            latents, noised = (x.to(self.device) for x in part)
            features = teacher_features(model, latents, noised, embeds, precision=self.precision)
            found.append(features.cpu())
        samples.teacher_features = torch.cat(found)

    @torch.no_grad()
    def compare_velocities(self, name: str, model: nn.Module) -> list[Row]:
        """Return a student's velocity error and cosine at each noise level of the kept states."""
        (first, _), *_ = self.states.values()
        velocity_fn = self.bind(model, slice(0, len(first)), self.settings.guidance_scale)
        rows = []
        for i, (state, velocity) in self.states.items():
            sigma = self.sigmas[i]
            found = velocity_fn(state, sigma.to(state.device).expand(len(state)))
            error, cosine = (x.mean().item() for x in metrics.velocity_error(found, velocity))
            row = {"velocity_error": error, "velocity_cosine": cosine}
            rows.append({"model": name, "sigma": sigma.item(), **row})
        return rows

    def measure(self, samples: Samples, teacher: Samples, velocity_rows: list[Row] | None) -> Row:
        """Return the row of one model, both described.

        velocity_rows: none for the teacher itself, and for models that are not sampled along its
            trajectories.

        With a judge `digit` and `motion` are the fractions of samples that show what their prompt
        asks for, and `frechet` is the distance to real clips.
        """
        row: Row = {"model": samples.model, **samples.counts}
        if self.labels is not None:
            digits, directions = self.labels
            row["digit"] = metrics.accuracy(samples.digit_logits, digits)
            row["motion"] = metrics.accuracy(samples.motion_logits, directions)
        own, others = (metrics.feature_statistics(x.features) for x in (samples, teacher))
        if self.judge is not None:
            real = (self.judge.real_mean, self.judge.real_cov)
            row["frechet"] = metrics.frechet_distance(*own, *real)
        row["seconds"] = samples.seconds
        row["steps"] = samples.steps
        is_teacher = samples is teacher
        row["frechet_to_teacher"] = 0.0 if is_teacher else metrics.frechet_distance(*own, *others)
        row["frechet_teacher_features"] = metrics.frechet_distance_of(
            samples.teacher_features, teacher.teacher_features
        )
        distance = metrics.sample_distance(samples.latents, teacher.latents)
        row["distance_to_teacher"] = distance.mean().item()
        row |= metrics.compare_videos(samples.video_measures, teacher.video_measures)
        variety = [metrics.diversity(x.latents, self.prompt_index) for x in (samples, teacher)]
        row["diversity"] = metrics.ratio(*variety)
        for key, perfect in (("velocity_error", 0.0), ("velocity_cosine", 1.0)):
            if velocity_rows:
                row[key] = sum(r[key] for r in velocity_rows) / len(velocity_rows)
            elif is_teacher:
                row[key] = perfect
        return row

    def _watch(self, done: int, *, keep: bool) -> Callable[[int, Tensor, Tensor], None]:
        def on_step(i: int, latents: Tensor, velocity: Tensor) -> None:
            if keep and i in self.levels:
                few = slice(0, _NUM_STATE_SAMPLES)
                self.states[i] = (latents[few].clone(), velocity[few].clone())
            self.callbacks.on_step_end(done + i + 1)

        return on_step

    @torch.no_grad()
    def _judge(self, latents: Tensor) -> dict[str, Tensor]:
        """Return a batch's latents, and what the judge or `latent_features` sees in them."""
        found = {"latents": latents}
        if self.judge is None:
            found["features"] = metrics.latent_features(latents)
        else:
            names = ("digit_logits", "motion_logits", "features")
            found |= zip(names, self.judge(self.teacher.decode(latents).float()), strict=True)
        return {name: tensor.cpu() for name, tensor in found.items()}

    @torch.no_grad()
    def _measure(self, latents: Tensor, shown: list[Tensor]) -> dict[str, Tensor]:
        """Return the measures of one video [1, C, F, H, W]; its frames are added to the first."""
        frames = self.teacher.decode(latents).float()
        if len(shown) < NUM_SHOWN:
            shown.append(metrics.to_bytes(frames).cpu())
        grey = frames if frames.ndim == 4 else metrics.brightness(frames)
        return {name: tensor.cpu() for name, tensor in metrics.measure_videos(grey).items()}

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def teacher_features(
    teacher: nn.Module, latents: Tensor, noise: Tensor, embeds: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """Return the output of the middle layer's self-attention at sigma 0.25, averaged over tokens.

    A diffusion model's activations at low noise tell content as a trained classifier's do (Tang et
    al. 2023), so a Frechet distance on them needs no other network for any kind of video. Attention
    is computed on normalised input: no few huge channels of the residual stream decide.

    latents: [B, C, F, H, W], x0. noise: alike; the same for all models that are compared.
    embeds: [S, T], one prompt for all, such as the negative one, so that prompts tell nothing.

    Returns [B, N D] fp32.
    Raises ValueError where the model has linear layers: it is no teacher then.
    """
    expert = expert_at(teacher, FEATURE_SIGMA)
    _, sites = identify(shapes_of(expert))
    modules = [attention_at(expert, site) for site in sites]
    if any(isinstance(module, LinearAttention | MixedAttention) for module in modules):
        raise ValueError("the model has linear layers; features are taken from the teacher alone")
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.float().mean(dim=1).flatten(1))

    sigma = torch.full((len(latents),), FEATURE_SIGMA, device=latents.device)
    velocity_fn = bind(teacher, embeds.expand(len(latents), -1, -1), precision=precision)
    hook = modules[len(modules) // 2].register_forward_hook(keep)
    try:
        velocity_fn(add_noise(latents, noise, sigma), sigma)
    finally:
        hook.remove()
    (features,) = found
    return features


def count_layers(model: nn.Module) -> dict[str, int]:
    """Return how many self-attention layers are linear and hybrid, and how many there are."""
    modules = [
        attention_at(part, site)
        for part in parts_of(model)
        for site in identify(shapes_of(part))[1]
    ]
    kinds = [module.form.kind for module in modules if isinstance(module, LinearAttention)]
    found = {f"{kind}_layers": kinds.count(kind) for kind in ("linear", "hybrid")}
    return {**found, "layers": len(modules)}
