"""The settings of a distillation."""

import dataclasses
from pathlib import Path

from ..demo import DEMO_GUIDANCE_SCALE
from ..run import limits
from ..run.config import Settings, option
from ..run.devices import device_option, precision_option
from ..run.errors import SettingError
from ..teacher.config import TeacherConfig, TrajectoryConfig
from ..training.config import TrainingConfig
from ..transfer.config import (
    EvaluationConfig,
    RecipeConfig,
    WarmStartConfig,
    check_frozen_weights,
)

ARTIFACT_NAME = "distilled.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig(Settings):
    """How many steps, and how generator and critic are trained for them."""

    num_steps: int = option(4, "steps that the distilled model samples in", limits.SAMPLER_STEPS)
    parameters: str = option("lora", "weights that are trained and saved", choices=("lora", "full"))
    lora_rank: int = option(
        32,
        "least rank of the weight changes (parameters lora); a file's own is kept",
        limits.LORA_RANK,
    )
    critic_steps: int = option(5, "critic updates for each update of the student", limits.COUNT)
    critic_learning_rate: float = option(2e-4, "peak learning rate of the critic", limits.POSITIVE)
    real_guidance_scale: float = option(
        DEMO_GUIDANCE_SCALE / 2,
        "guidance baked in: of the real score, u + scale (c - u)",
        limits.GUIDANCE_SCALE,
    )
    motion_weight: float = option(
        0.0, "weight of a loss that holds motion at the teacher's", limits.LOSS_WEIGHT
    )
    regression_weight: float = option(
        1.0,
        "weight of a loss that leads stored states to the teacher's own videos",
        limits.LOSS_WEIGHT,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """The run."""

    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    trajectories: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    artifact: Path | None = option(None, "LINVIDEO file; none: the embedded model's own")
    single_stage: bool = option(
        False, "take only the choice of layers from the file: linearize and distil at once"
    )
    out: Path = option(Path("runs/distill"), "run folder")
    seed: int = option(0, "seed of everything random", limits.SEED)
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        num_samples = self.training.batch_size * self.training.accumulation
        if num_samples < self.distillation.num_steps:
            raise SettingError(
                f"{{batch_size}} {self.training.batch_size} and {{accumulation}} "
                f"{self.training.accumulation} given; together {{num_steps}} "
                f"{self.distillation.num_steps} or more are needed, a video for each step",
                "batch_size",
                "accumulation",
                "num_steps",
            )
        check_artifact(self.teacher.model, self.artifact)
        by = "parameters" if self.distillation.parameters == "full" else ""
        check_frozen_weights(self.teacher.frozen_weights, self.training, by)
        self.teacher.softmax.check_training()


def check_artifact(model: Path | None, artifact: Path | None) -> None:
    """Raise SettingError for a model of one's own without a file that was made for it."""
    if model is not None and artifact is None:
        raise SettingError(
            "{model} was given without {artifact}; give the file made for it", "artifact", "model"
        )
