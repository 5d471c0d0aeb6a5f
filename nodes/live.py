"""How a transfer shows itself in ComfyUI while it runs: the bar, Interrupt, and a live picture."""

import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ..linvideo_core.flow import make_sigmas, sample_euler
from ..linvideo_core.linearization import TransferConfig
from ..linvideo_core.models.denoiser import bind_guided
from ..linvideo_core.preview import draw_preview
from ..linvideo_core.run_folder import read_metrics
from ..linvideo_core.student import Student
from ..linvideo_core.subject import Subject
from .video import Video

# Where each stage lies on the bar, by the time that it takes with usual settings.
_STAGES = {
    "sampling the teacher": (0, 25),
    "warm start": (25, 28),
    "ranking the layers": (28, 30),
    "training": (30, 100),
}
_TRAINING = "training"
_SAMPLER_STEPS, _NUM_FRAMES = 8, 5
_MAX_SIZE = 768
# A picture waits this many times as long as the one before took to make, and at least so long.
_PATIENCE, _MIN_SECONDS = 12, 2.0


class LiveProgress:
    """The core's `Progress`, shown on the node; raises ComfyUI's exception on Interrupt."""

    def __init__(
        self,
        student: Student,
        subject: Subject,
        config: TransferConfig,
        latent_format: Any,
        video: Video,
    ) -> None:
        self._student = student
        self._subject = subject
        self._config = config
        self._latent_format = latent_format
        self._video = video
        self._bar = comfy.utils.ProgressBar(100)
        self._teacher_frames: list[Image.Image] | None = None
        self._next_picture = 0.0

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """Move the bar, and draw the picture when it is due."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        first, last = _STAGES[stage]
        preview = None
        if stage == _TRAINING and (done == total or time.monotonic() >= self._next_picture):
            start = time.monotonic()
            preview = ("JPEG", self._draw(done, total, metrics), _MAX_SIZE)
            seconds = time.monotonic() - start
            self._next_picture = time.monotonic() + max(_MIN_SECONDS, _PATIENCE * seconds)
        # 100 is for the caller: ComfyUI takes it as the end.
        value = min(99, first + (last - first) * done // max(1, total))
        self._bar.update_absolute(value, 100, preview)

    @torch.no_grad()
    def _draw(self, done: int, total: int, metrics: dict[str, float]) -> Image.Image:
        if self._teacher_frames is None:
            self._teacher_frames = self._sample(self._subject.model)
        videos = {}
        if self._teacher_frames:
            videos = {"before": self._teacher_frames, "now": self._sample(self._student.model)}
        path = self._config.out / _TRAINING / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        title = f"step {done} of {total}{loss}"
        return draw_preview(rows, videos, title=title, num_steps=total)

    def _sample(self, model: torch.nn.Module) -> list[Image.Image]:
        """Sample one video in a few steps; none where this format has no quick preview."""
        if self._latent_format.latent_rgb_factors is None:
            return []
        subject, settings = self._subject, self._config.trajectories
        generator = torch.Generator().manual_seed(self._config.seed)
        noise = torch.randn(1, *subject.latent_shape, generator=generator)
        velocity_fn = bind_guided(
            model,
            subject.prompt_embeds[:1],
            subject.negative_embeds.unsqueeze(0),
            settings.guidance_scale,
        )
        sigmas = make_sigmas(_SAMPLER_STEPS, settings.shift)
        latents = sample_euler(velocity_fn, noise.to(subject.prompt_embeds.device), sigmas)
        return self._show(latents)

    def _show(self, latents: Tensor) -> list[Image.Image]:
        latents = self._video.show(latents)
        if self._subject.is_demo:
            frames = self._subject.decode(latents)[0].mul(255).byte().cpu().numpy()
            picks = torch.linspace(0, len(frames) - 1, _NUM_FRAMES).long().tolist()
            return [Image.fromarray(frames[pick]) for pick in picks]
        previewer = latent_preview.Latent2RGBPreviewer(
            self._latent_format.latent_rgb_factors,
            self._latent_format.latent_rgb_factors_bias,
            getattr(self._latent_format, "latent_rgb_factors_reshape", None),
        )
        picks = torch.linspace(0, latents.shape[2] - 1, _NUM_FRAMES).long().unique().tolist()
        return [previewer.decode_latent_to_preview(latents[:, :, f : f + 1]) for f in picks]
