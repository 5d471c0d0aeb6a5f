"""How a transfer shows itself in ComfyUI while it runs: bar, words on the node, a live picture."""

import contextlib
import dataclasses
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
from torch import Tensor, nn

from ...linvideo_core.flow import TIMESTEP_SCALE, bind_guided, make_sigmas, sample_euler
from ...linvideo_core.run.callbacks import Callbacks, Stage
from ...linvideo_core.run.folder import read_metrics
from ...linvideo_core.teacher.teacher import Teacher
from ...linvideo_core.transfer.config import TransferConfig
from ...linvideo_core.transfer.preview import draw_preview
from ...linvideo_core.transfer.student import Student
from ..patching.apply import show_words
from ..patching.families import Video

# Where each stage lies on the bar, by the time that it takes with usual settings; its words.
_STAGES = {
    "sampling_teacher": (0, 25, "the original model makes videos to learn from", "video"),
    "filling_pool": (0, 25, "the original model begins videos to learn from", "step"),
    "warm_start": (25, 28, "the new layers come close to the original ones", "step"),
    "ranking_layers": (28, 30, "the layers are compared", "layer"),
    "training": (30, 100, "training", "step"),
}
# Those in which the original model makes videos, which the picture shows.
_SAMPLING = ("sampling_teacher", "filling_pool")
_SAMPLER_STEPS, _NUM_FRAMES = 8, 3
_MAX_SIZE = 1024
# A picture waits this many times as long as the one before took to make, and at least so long; the
# first of a large model's training, which samples it, waits longer.
_PATIENCE, _MIN_SECONDS, _FIRST_SECONDS = 12, 2.0, 60.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _CurrentStage:
    """A stage at work: `done` of `total` units, the first of which an earlier run finished."""

    name: str
    total: int
    first: int
    done: int
    begun: float

    @property
    def words(self) -> str:
        *_, meaning, unit = _STAGES[self.name]
        return f"{meaning}: {unit} {min(self.done + 1, self.total)} of {self.total}"

    @property
    def seconds_left(self) -> float | None:
        """Of the stage, by its pace until now; None where nothing was done yet or all is."""
        counted = self.done - self.first
        if not counted or self.done >= self.total:
            return None
        return (time.monotonic() - self.begun) * (self.total - self.done) / counted


class LiveProgress(Callbacks):
    """Shows on the node where a transfer stands; raises ComfyUI's exception on Interrupt.

    In training the picture needs videos of both models, which are sampled for it, rarely.
    """

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
        self._teacher = teacher
        self._config = config
        self._latent_format = latent_format
        self._video = video
        self._forecast = forecast
        self._bar = comfy.utils.ProgressBar(100)
        self._stage: _CurrentStage | None = None
        self._estimate: Tensor | None = None
        self._teacher_frames: list[Image.Image] | None = None
        self._next_picture = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the teacher samples, for the picture; say what stays when something stops it."""
        hook = self._teacher.model.register_forward_hook(self._keep_estimate)
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            kept = "what was finished is kept, queue again to go on"
            show_on_node(f"stopped while {self._where}: {kept}")
            raise
        except Exception:
            show_on_node(f"ended by an error while {self._where}; ComfyUI shows what is wrong")
            raise
        finally:
            hook.remove()

    @property
    def _where(self) -> str:
        return "beginning" if self._stage is None else self._stage.words

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        """Say which stage begins."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        self._stage = _CurrentStage(stage, total, done, done, now)
        is_quick = stage in _SAMPLING or self._teacher.is_demo
        self._next_picture = now + (0.0 if is_quick else _FIRST_SECONDS)
        self._show(None)

    def on_step_end(self, done: int, **metrics: float) -> None:
        """Move the bar, with a new picture when it is due."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        stage = self._stage
        stage.done = done
        picture = self._draw(metrics) if self._is_picture_due() else None
        self._show(picture)
        if done == stage.total > stage.first:
            seconds, unit = time.monotonic() - stage.begun, _STAGES[stage.name][-1]
            counted = done - stage.first
            logger.info("LinVideo: %s: %d %ss in %.2f s", stage.name, counted, unit, seconds)

    def _show(self, picture: Image.Image | None) -> None:
        stage = self._stage
        first, last, *_ = _STAGES[stage.name]
        # 100 is for the caller: ComfyUI takes it as the end.
        value = min(99, first + (last - first) * stage.done // max(1, stage.total))
        preview = ("JPEG", picture, _MAX_SIZE) if picture is not None else None
        self._bar.update_absolute(value, 100, preview)
        left = stage.seconds_left
        words = stage.words + ("" if left is None else f", {show_time(left)} left")
        show_on_node(f"{words[:1].upper()}{words[1:]}.\n{self._forecast}")

    def _is_picture_due(self) -> bool:
        stage = self._stage
        if stage.name not in (*_SAMPLING, "training"):
            return False
        is_last = self._teacher_frames is not None and stage.done == stage.total
        return is_last or time.monotonic() >= self._next_picture

    @torch.no_grad()
    def _draw(self, metrics: dict[str, float]) -> Image.Image | None:
        """Draw the stage's picture; its seconds are not the stage's, and the next one waits."""
        start = time.monotonic()
        is_training = self._stage.name == "training"
        picture = self._draw_training(metrics) if is_training else self._draw_sampling()
        seconds = time.monotonic() - start
        self._stage.begun += seconds
        self._next_picture = time.monotonic() + max(_MIN_SECONDS, _PATIENCE * seconds)
        return picture

    def _draw_sampling(self) -> Image.Image | None:
        """Draw the video that the teacher is making, as its last call estimates it."""
        frames = [] if self._estimate is None else self._decode(self._estimate)
        *_, unit = _STAGES[self._stage.name]
        number = min(self._stage.done + 1, self._stage.total)
        title = f"{unit} {number} of {self._stage.total}, as the original model makes it"
        return draw_preview([], {"": frames}, title=title, num_steps=1) if frames else None

    def _draw_training(self, metrics: dict[str, float]) -> Image.Image:
        """Sample a video with both models, and draw them above the curves of the layers."""
        stage, videos = self._stage, {}
        if self._teacher_frames is None:
            with self._student.disabled():
                self._teacher_frames = self._sample(self._teacher.model)
        if self._teacher_frames:
            now = self._sample(self._student.model)
            videos = {"the original model": self._teacher_frames, "the faster one now": now}
        path = self._config.out / "training" / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        title = f"step {stage.done} of {stage.total}{loss}"
        kind = self._config.student.form.kind
        return draw_preview(rows, videos, title=title, num_steps=stage.total, kind=kind)

    def _keep_estimate(self, _: Any, inputs: tuple[Tensor, ...], velocity: Tensor) -> None:
        """Keep the first video as a call of the teacher estimates it: state - sigma velocity.

        In other stages the picture needs none, and the model is the student's, too.
        """
        if self._stage is None or self._stage.name not in _SAMPLING:
            return
        latents, timesteps = (x.detach()[:1] for x in inputs[:2])
        sigma = (timesteps / TIMESTEP_SCALE).view(-1, *[1] * (latents.ndim - 1))
        self._estimate = latents - sigma * velocity.detach()[:1]

    def _sample(self, model: nn.Module) -> list[Image.Image]:
        """Sample one video in a few steps; none where this format has no quick preview."""
        if self._latent_format.latent_rgb_factors is None:
            return []
        teacher, settings = self._teacher, self._config.trajectories
        generator = torch.Generator().manual_seed(self._config.seed)
        noise = torch.randn(1, *teacher.latent_shape, generator=generator)
        prompts = teacher.prompt_embeds[:1], teacher.negative_embeds.unsqueeze(0)
        velocity_fn = bind_guided(model, *prompts, settings.guidance_scale)
        sigmas = make_sigmas(_SAMPLER_STEPS, settings.shift)
        return self._decode(sample_euler(velocity_fn, noise.to(prompts[0].device), sigmas))

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Return a few frames of the first of latents [B, C, F, H, W]; none without a preview."""
        latents, latent_format = self._video.show(latents), self._latent_format
        if self._teacher.is_demo:
            frames = self._teacher.decode(latents)[0].mul(255).byte().cpu().numpy()
            picks = torch.linspace(0, len(frames) - 1, _NUM_FRAMES).long().tolist()
            return [Image.fromarray(frames[pick]) for pick in picks]
        if latent_format.latent_rgb_factors is None:
            return []
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            getattr(latent_format, "latent_rgb_factors_reshape", None),
        )
        picks = torch.linspace(0, latents.shape[2] - 1, _NUM_FRAMES).long().unique().tolist()
        return [previewer.decode_latent_to_preview(latents[:, :, f : f + 1]) for f in picks]


def show_time(seconds: float) -> str:
    """Return a duration as a person says it, such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_on_node(words: str) -> None:
    """Show words under the node that is running."""
    context = get_executing_context()
    show_words(words, None if context is None else context.node_id)
