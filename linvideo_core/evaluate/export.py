"""Videos in VBench's naming: of every prompt some, by the teacher and by its students."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..artifact import Artifact, apply
from ..flow import Recipe, bind_guided, make_sigmas
from ..run.callbacks import Callbacks
from ..run.errors import SettingError
from ..teacher.teacher import Teacher
from .config import CompareConfig
from .metrics import to_bytes
from .sampler import draw_noise, find_fps
from .videos import save_video

_MAX_BYTES = 255  # Of a file's name, on most file systems.


def name_video(prompt: str, index: int) -> str:
    """Return how VBench names a prompt's video."""
    return f"{prompt}-{index}.mp4"


def check_names(prompts: Sequence[str]) -> None:
    """Raise SettingError where a prompt cannot be a file's name."""
    for prompt in prompts:
        size = len(name_video(prompt, 10).encode())
        if "/" in prompt or "\\" in prompt or size > _MAX_BYTES:
            raise SettingError(
                f"{{prompts}} has {prompt[:60]!r}, which cannot be a file's name; plain prompts of "
                "up to about 240 letters, such as VBench's all_dimension.txt, are needed",
                "prompts",
            )


def export_videos(
    teacher: Teacher,
    students: Mapping[str, Artifact],
    settings: CompareConfig,
    folder: Path,
    *,
    seed: int,
    precision: str,
    callbacks: Callbacks,
) -> None:
    """Write `seeds_per_prompt` videos of every prompt by each student, then by the teacher.

    students: name -> file; one that is bound to noise levels is sampled at them.

    The videos of a model lie in a folder of its name, which holds nothing else. Each video has
    noise of its own, the same for all models; what is there already is not sampled again.
    """
    sigmas = make_sigmas(settings.sampler_steps, settings.shift)
    plain = Recipe(sigmas=sigmas, guidance_scale=settings.guidance_scale)
    for name, made in (*students.items(), ("teacher", None)):
        recipe = plain
        if made and made.header.sigmas:
            levels = torch.tensor(made.header.sigmas)
            recipe = Recipe(sigmas=levels, guidance_scale=1.0, is_few_step=True)
        numbers = {
            folder / name / name_video(prompt, index): index * len(teacher.prompts) + number
            for index in range(settings.seeds_per_prompt)
            for number, prompt in enumerate(teacher.prompts)
        }
        missing = [path for path in numbers if not path.exists()]
        done = len(numbers) - len(missing)
        callbacks.on_stage("evaluation", len(numbers), done, detail=name)
        with apply(made, teacher.model) if made else contextlib.nullcontext(teacher.model) as model:
            for start in range(0, len(missing), settings.batch_size):
                paths = missing[start : start + settings.batch_size]
                part = {path: numbers[path] for path in paths}
                _export(teacher, model, part, recipe, seed=seed, precision=precision)
                callbacks.on_step_end(done + start + len(part))


@torch.no_grad()
def _export(
    teacher: Teacher,
    model: nn.Module,
    numbers: Mapping[Path, int],
    recipe: Recipe,
    *,
    seed: int,
    precision: str,
) -> None:
    """Write a batch of videos; numbers: path -> the video's own, which its noise follows from."""
    picks = [number % len(teacher.prompts) for number in numbers.values()]
    embeds = teacher.prompt_embeds[picks]
    negative = teacher.negatives_for(embeds)
    velocity_fn = bind_guided(model, embeds, negative, recipe.guidance_scale, precision=precision)
    shape = teacher.latent_shape
    noise = torch.cat([draw_noise(shape, 1, seed + number) for number in numbers.values()])
    latents = recipe.sample(
        velocity_fn,
        noise.to(embeds.device),
        seed=seed + min(numbers.values()),
        on_step=lambda *step: None,
    )
    for path, latent in zip(numbers, latents.split(1), strict=True):
        frames = to_bytes(teacher.decode(latent))[0].cpu().numpy()
        save_video(frames, path, find_fps(teacher))
