"""Settings of the teacher: which model, and how its trajectories are sampled."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT, DEMO_STEPS
from ..models.config import FrozenConfig, SoftmaxConfig
from ..prompts.config import PromptConfig
from ..run import limits
from ..run.config import Settings, option
from ..run.errors import SettingError, shown_value

STATES = ("stored", "pool")
TIME_COMPRESSION = 4
"""Frames that one frame of latents stands for."""
_PIXELS = dataclasses.replace(limits.PIXELS, low=16, step=16)
_OF_OWN_MODELS = ("num_frames", "height", "width", "card")


def check_embedded(given: Mapping[str, Any]) -> None:
    """Raise SettingError for what was given of the embedded model, and it does not have.

    given: settings by the names of their fields.
    """
    names = [name for name in _OF_OWN_MODELS if name in given]
    if names:
        shown = " ".join(f"{{{name}}} {given[name]}" for name in names)
        raise SettingError(
            f"{shown} is for a {{model}} of your own, and none was given: give {{model}}, or leave "
            "it out",
            *names,
            "model",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings):
    """Model, prompts and video size."""

    model: Path | None = option(
        None, "Wan safetensors, text- or image-to-video; none: the embedded model"
    )
    prompts: Path | None = option(
        None, "prompts, one a line, or a safetensors file of embeddings; none: those of LinVideo"
    )
    text: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    softmax: SoftmaxConfig = dataclasses.field(default_factory=SoftmaxConfig)
    num_frames: int = option(81, "video frames, with --model", limits.FRAMES)
    height: int = option(480, "video height in pixels, with --model", _PIXELS)
    width: int = option(832, "video width in pixels, with --model", _PIXELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.num_frames - 1) % TIME_COMPRESSION:
            raise SettingError(
                f"{{num_frames}} {self.num_frames} given; 4 n + 1 is needed, such as 81",
                "num_frames",
            )
        if self.model is None and self.frozen_weights.given:
            raise SettingError(
                f"{self.frozen_weights.given} is for a {{model}} of your own, and none was "
                "given: give {model}, or leave it out",
                "model",
                "frozen",
                "offload_blocks",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(Settings):
    """The videos that the teacher samples, to learn from."""

    num_trajectories: int = option(
        24, "videos that the teacher samples first and keeps", limits.VIDEOS
    )
    states_per_trajectory: int = option(
        8, "noise levels used of each, spread over the trajectory", limits.SAMPLER_STEPS
    )
    sampler_steps: int = option(DEMO_STEPS, "Euler steps of the teacher", limits.SAMPLER_STEPS)
    guidance_scale: float = option(
        DEMO_GUIDANCE_SCALE, "classifier-free guidance of the teacher", limits.GUIDANCE_SCALE
    )
    shift: float = option(
        DEMO_SHIFT, "warp of the noise levels: Wan takes 3 for 480p, 5 for 720p", limits.SHIFT
    )
    shard_size: int = option(8, "videos sampled together", limits.VIDEOS)
    teacher_folder: Path | None = option(
        None,
        "where the teacher's samples are kept for every run that can use them; none: the folder "
        "`teacher` beside --out",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states_per_trajectory > self.sampler_steps:
            raise SettingError(
                f"{{states_per_trajectory}} {self.states_per_trajectory} given; at most "
                f"{{sampler_steps}} {self.sampler_steps} can be kept",
                "states_per_trajectory",
                "sampler_steps",
            )

    def folder_beside(self, out: Path) -> Path:
        """Return where the samples of a run with this run folder are kept."""
        return self.teacher_folder or out.parent / "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Settings):
    """Whether the states that a student learns from are stored, or those of a pool."""

    states: str = option(
        "stored",
        "learn from videos that are sampled first and kept, or from a pool of videos that move on "
        "as they are used",
        choices=STATES,
    )
    pool_videos: int = option(
        32, "videos in flight of a pool, of all sizes together", limits.VIDEOS
    )
    more_sizes: str | None = option(
        None,
        "other sizes that a pool's videos have, with --model: width x height x frames, such as "
        "480x832x81,832x480x33",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = "[0-9]{1,5}x[0-9]{1,5}x[0-9]{1,5}"
        if self.more_sizes is not None and not re.fullmatch(f"{size}(,{size})*", self.more_sizes):
            raise SettingError(
                f"{{more_sizes}} {shown_value(self.more_sizes)} given; width x height "
                "x frames is needed, such as 480x832x81, with commas between several sizes",
                "more_sizes",
            )

    @property
    def sizes(self) -> list[dict[str, int]]:
        """`more_sizes` as fields of `TeacherConfig`."""
        texts = self.more_sizes.split(",") if self.more_sizes else []
        names = ("width", "height", "num_frames")
        return [dict(zip(names, map(int, text.split("x")), strict=True)) for text in texts]
