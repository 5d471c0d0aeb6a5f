"""Settings of comparisons."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from ..demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT, DEMO_STEPS
from ..models.config import SOFTMAX_KERNELS, SoftmaxConfig
from ..run import limits
from ..run.config import Settings, option
from ..run.devices import device_option, precision_option
from ..run.errors import SettingError, shown_value
from ..teacher.config import TeacherConfig


def vae_option() -> Any:
    """Declare the config field `vae`."""
    return option(
        None, "Wan's autoencoder, to measure and show decoded videos; none: the mean latent channel"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """How the models are sampled."""

    num_samples: int = option(20, "videos that each model samples", limits.COMPARED_VIDEOS)
    seeds_per_prompt: int = option(
        1, "videos in a row of one prompt: 2 or more show diversity", limits.VIDEOS
    )
    sampler_steps: int = option(DEMO_STEPS, "Euler steps", limits.SAMPLER_STEPS)
    guidance_scale: float = option(
        DEMO_GUIDANCE_SCALE, "classifier-free guidance", limits.GUIDANCE_SCALE
    )
    shift: float = option(
        DEMO_SHIFT, "warp of the noise levels: Wan takes 3 for 480p, 5 for 720p", limits.SHIFT
    )
    batch_size: int = option(10, "videos sampled together", limits.VIDEOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What is compared, and where results go."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    artifact: Path | None = option(None, "LINVIDEO file; none: the embedded model's own")
    distilled: str = option(
        "", "files that were distilled from it, such as a.safetensors,b.safetensors; none: no few"
    )
    vae: Path | None = vae_option()
    export_videos: Path | None = option(
        None, "folder for videos in VBench's naming, in place of the comparison"
    )
    lora: Path | None = option(
        None, "few-step LoRA of others, to be added to the linearized model and to its teacher"
    )
    lora_strength: float = option(1.0, "share of the LoRA's change that is added", limits.STRENGTH)
    lora_sigmas: str = option(
        "", "noise levels to sample at with the LoRA, such as 1,0.9,0.7,0; none: 4 steps at --shift"
    )
    plain_steps: str = option(
        "25,8,4", "with --distilled or --lora: Euler steps that teacher and linearized model take"
    )
    kernels: str = option(
        "",
        "kernels of softmax layers to compare with the teacher, alone and beside the file's linear "
        "layers, sparse ones with their density, such as cudnn,sparse:0.1,sparse:0.2; none: the "
        "usual comparison",
    )
    dense_share: float = option(
        0.2,
        "with --kernels: share of the steps, from the first, in which sparse layers stay dense",
        limits.FRACTION,
    )
    out: Path = option(Path("runs/evaluate"), "folder for tables and pictures")
    seed: int = option(0, "seed of noise and prompts", limits.SEED)
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.model is not None and self.artifact is None and not self.kernels:
            raise SettingError(
                "{model} was given without {artifact}; give the file made for it",
                "artifact",
                "model",
            )
        if self.export_videos is not None and self.lora is not None:
            raise SettingError(
                "{export_videos} and {lora} given; videos are exported of LINVIDEO files alone: "
                "leave one out",
                "export_videos",
                "lora",
            )
        if self.export_videos is not None and self.teacher.softmax.is_sparse:
            raise SettingError(
                "{softmax_kernel} sparse and {export_videos} given: leave one out",
                "softmax_kernel",
                "export_videos",
            )
        if self.export_videos is not None and self.teacher.model and self.vae is None:
            raise SettingError(
                "{export_videos} was given without {vae}, which decodes the videos; give Wan's "
                "autoencoder",
                "vae",
                "export_videos",
            )
        self.numbers_of_plain_steps()
        self.levels_of_lora()
        if self.list_kernels():
            self._check_kernels_alone()

    def _check_kernels_alone(self) -> None:
        others = {
            "distilled": bool(self.distilled),
            "lora": self.lora is not None,
            "export_videos": self.export_videos is not None,
            "softmax_kernel": self.teacher.softmax.is_sparse,
        }
        for name in (name for name, is_given in others.items() if is_given):
            given = "{softmax_kernel} sparse" if name == "softmax_kernel" else f"{{{name}}}"
            raise SettingError(
                f"{{kernels}} {self.kernels} and {given} given, which are two comparisons: leave "
                "one of them out",
                "kernels",
                name,
            )

    def list_kernels(self) -> list[SoftmaxConfig]:
        """Return the kernels of `kernels`, none by default; SettingError for other words."""
        words = self.kernels.split(",") if self.kernels else []
        return [_read_kernel(word.strip(), self.kernels) for word in words]

    def distilled_paths(self) -> list[Path]:
        """Return the distilled files, none by default."""
        return [Path(name.strip()) for name in self.distilled.split(",") if name.strip()]

    def numbers_of_plain_steps(self) -> list[int]:
        """Return the numbers of Euler steps to compare with all; SettingError for other words."""
        words = [word.strip() for word in self.plain_steps.split(",") if word.strip()]
        if not all(re.fullmatch("[0-9]{1,6}", word) for word in words):
            raise SettingError(
                f"{{plain_steps}} {shown_value(self.plain_steps)} given; numbers such as "
                "25,8,4 are needed",
                "plain_steps",
            )
        numbers = set(map(int, words)) - {0, self.comparison.sampler_steps}
        return sorted(numbers, reverse=True)

    def levels_of_lora(self) -> list[float]:
        """Return the noise levels to sample at with the LoRA; none for 4 steps at `shift`.

        Raises SettingError for anything but numbers that fall from at most 1 to 0.
        """
        if not self.lora_sigmas:
            return []
        try:
            levels = [float(word) for word in self.lora_sigmas.split(",")]
        except ValueError:
            levels = []
        falls = all(high > low for high, low in itertools.pairwise(levels))
        if len(levels) < 2 or not falls or levels[0] > 1 or levels[-1] != 0:
            raise SettingError(
                f"{{lora_sigmas}} {shown_value(self.lora_sigmas)} given; numbers that "
                "fall from at most 1 to 0, such as 1,0.9,0.7,0, are needed",
                "lora_sigmas",
            )
        return levels


def _read_kernel(word: str, given: str) -> SoftmaxConfig:
    """Return the kernel of a word such as "cudnn" or "sparse:0.1"; given: all words."""
    name, _, density = word.partition(":")
    try:
        return SoftmaxConfig(softmax_kernel=name, density=float(density) if density else None)
    except ValueError:
        raise SettingError(
            f"{{kernels}} {shown_value(given)} given, and {shown_value(word)} is none: "
            f"{', '.join(SOFTMAX_KERNELS)} are known, sparse with a density above 0 and at most 1, "
            "such as cudnn,sparse:0.1",
            "kernels",
        ) from None
