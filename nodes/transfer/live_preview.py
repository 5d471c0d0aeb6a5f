"""How a transfer shows itself in ComfyUI while it runs: bar, words on the node, a live picture."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...linvideo_core.flow import make_sigmas, sample_euler
from ...linvideo_core.models.velocity import TIMESTEP_SCALE, bind_guided
from ...linvideo_core.run.folder import read_metrics
from ...linvideo_core.teacher.teacher import Teacher
from ...linvideo_core.transfer.config import TransferConfig
from ...linvideo_core.transfer.preview import draw_preview
from ...linvideo_core.transfer.student import Student
from ..patching.families.video import Video
from ..patching.report import show_words

# Where each stage lies on the bar, by the time that it takes with usual settings; its words.
_STAGES = {
    "sampling the teacher": (0, 25, "the original model makes videos to learn from", "video"),
    "warm start": (25, 28, "the linear layers come close to the original ones", "step"),
    "ranking the layers": (28, 30, "the layers are compared", "layer"),
    "training": (30, 100, "training", "step"),
}
_SAMPLING, _TRAINING = "sampling the teacher", "training"
_SAMPLER_STEPS, _NUM_FRAMES = 8, 3
_MAX_SIZE = 1024
# A picture waits this many times as long as the one before took to make, and at least so long; the
# first of a large model's training, which samples it, waits longer.
_PATIENCE, _MIN_SECONDS, _FIRST_SECONDS = 12, 2.0, 60.0

logger = logging.getLogger(__name__)


class LiveProgress:
    """The core's `Progress`, shown on the node; raises ComfyUI's exception on Interrupt."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        config: TransferConfig,
        latent_format: Any,
        video: Video,
        forecast: str,
    ) -> None:
        """forecast: a sentence on all of it, which stays under the words on the stage."""
        self._student = student
        self._subject = teacher
        self._config = config
        self._latent_format = latent_format
        self._video = video
        self._forecast = forecast
        self._bar = comfy.utils.ProgressBar(100)
        self._clock = _StageClock()
        self._estimate: Tensor | None = None
        self._teacher_frames: list[Image.Image] | None = None
        self._next_picture = 0.0
        self._stage = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the teacher samples, for the picture; say what stays when something stops it."""
        hook = self._subject.model.register_forward_hook(self._see)
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            kept = "what was finished is kept, queue again to go on"
            say(f"stopped while {self._clock.stage}: {kept}")
            raise
        except Exception:
            say(f"ended by an error while {self._clock.stage}; ComfyUI shows what is wrong")
            raise
        finally:
            hook.remove()

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """Move the bar, say where it stands, and draw the picture when it is due."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        words = self._clock.tell(stage, done, total)
        first, last, *_ = _STAGES[stage]
        preview = None
        if stage != self._stage:
            self._stage = stage
            is_quick = stage == _SAMPLING or self._subject.is_demo
            self._next_picture = time.monotonic() + (0.0 if is_quick else _FIRST_SECONDS)
        is_last = self._teacher_frames is not None and done == total
        if stage in (_SAMPLING, _TRAINING) and (is_last or time.monotonic() >= self._next_picture):
            start = time.monotonic()
            picture = self._draw(stage, done, total, metrics)
            seconds = time.monotonic() - start
            self._clock.leave_out(seconds)
            self._next_picture = time.monotonic() + max(_MIN_SECONDS, _PATIENCE * seconds)
            preview = ("JPEG", picture, _MAX_SIZE) if picture is not None else None
        # 100 is for the caller: ComfyUI takes it as the end.
        value = min(99, first + (last - first) * done // max(1, total))
        self._bar.update_absolute(value, 100, preview)
        say(f"{words[:1].upper()}{words[1:]}.\n{self._forecast}")

    @torch.no_grad()
    def _draw(
        self, stage: str, done: int, total: int, metrics: dict[str, float]
    ) -> Image.Image | None:
        if stage == _SAMPLING:
            frames = [] if self._estimate is None else self._show(self._estimate)
            title = f"video {min(done + 1, total)} of {total}, as the original model makes it"
            return draw_preview([], {"": frames}, title=title, num_steps=1) if frames else None
        if self._teacher_frames is None:
            self._teacher_frames = self._sample(self._subject.model)
        videos = {}
        if self._teacher_frames:
            now = self._sample(self._student.model)
            videos = {"the original model": self._teacher_frames, "the faster one now": now}
        path = self._config.out / _TRAINING / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        title = f"step {done} of {total}{loss}"
        return draw_preview(rows, videos, title=title, num_steps=total)

    def _see(self, _: Any, inputs: tuple[Tensor, ...], velocity: Tensor) -> None:
        """Keep what a call of the teacher says of the first video: state less sigma velocity."""
        latents, timesteps = (x.detach()[:1] for x in inputs[:2])
        sigma = (timesteps / TIMESTEP_SCALE).view(-1, *[1] * (latents.ndim - 1))
        self._estimate = latents - sigma * velocity.detach()[:1]

    def _sample(self, model: torch.nn.Module) -> list[Image.Image]:
        """Sample one video in a few steps; none where this format has no quick preview."""
        if self._latent_format.latent_rgb_factors is None:
            return []
        teacher, settings = self._subject, self._config.trajectories
        generator = torch.Generator().manual_seed(self._config.seed)
        noise = torch.randn(1, *teacher.latent_shape, generator=generator)
        velocity_fn = bind_guided(
            model,
            teacher.prompt_embeds[:1],
            teacher.negative_embeds.unsqueeze(0),
            settings.guidance_scale,
        )
        sigmas = make_sigmas(_SAMPLER_STEPS, settings.shift)
        latents = sample_euler(velocity_fn, noise.to(teacher.prompt_embeds.device), sigmas)
        return self._show(latents)

    def _show(self, latents: Tensor) -> list[Image.Image]:
        """Return a few frames of the first of latents [B, C, F, H, W]; none without a preview."""
        latents = self._video.show(latents)
        if self._subject.is_demo:
            frames = self._subject.decode(latents)[0].mul(255).byte().cpu().numpy()
            picks = torch.linspace(0, len(frames) - 1, _NUM_FRAMES).long().tolist()
            return [Image.fromarray(frames[pick]) for pick in picks]
        if self._latent_format.latent_rgb_factors is None:
            return []
        previewer = latent_preview.Latent2RGBPreviewer(
            self._latent_format.latent_rgb_factors,
            self._latent_format.latent_rgb_factors_bias,
            getattr(self._latent_format, "latent_rgb_factors_reshape", None),
        )
        picks = torch.linspace(0, latents.shape[2] - 1, _NUM_FRAMES).long().unique().tolist()
        return [previewer.decode_latent_to_preview(latents[:, :, f : f + 1]) for f in picks]


class _StageClock:
    """Where a stage stands and how long it will take, in words."""

    def __init__(self) -> None:
        self.stage = "beginning"
        self._stage = ""
        self._begun, self._first = 0.0, 0

    def tell(self, stage: str, done: int, total: int) -> str:
        """Return the words; log how long a stage took when it is done."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._first = stage, now, done
        *_, meaning, unit = _STAGES[stage]
        self.stage = words = f"{meaning}: {unit} {min(done + 1, total)} of {total}"
        seconds, counted = now - self._begun, done - self._first
        if counted and done < total:
            words += f", {show_time(seconds * (total - done) / counted)} left"
        if counted and done == total:
            logger.info("LinVideo: %s: %d %ss in %.2f s", stage, counted, unit, seconds)
        return words

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds that went into a picture."""
        self._begun += seconds


def show_time(seconds: float) -> str:
    """Return a duration as a person says it, such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(words: str) -> None:
    """Show words under the node that is running."""
    context = get_executing_context()
    show_words(words, None if context is None else context.node_id)
