"""The settings of a transfer, and which of them contradict one another."""

import dataclasses
from pathlib import Path

from ..models.experts import ExpertsConfig
from ..models.quantized import FrozenConfig
from ..run.config import option
from ..run.devices import device_option, precision_option
from ..run.errors import SettingError
from ..teacher.teacher import TeacherConfig
from ..teacher.trajectories import TrajectoryConfig
from ..training.trainer import TrainingConfig
from .batches import ObjectiveConfig
from .evaluation import EvaluationConfig
from .layer_selection.rules import SelectionConfig
from .layer_selection.sensitivity import SensitivityConfig
from .student import StudentConfig
from .warm_start import WarmStartConfig

ARTIFACT_NAME = "linearized.safetensors"
WARM_START_NAME = "warm_start"
TRAINING_NAME = "training"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Everything that decides the result of a transfer."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    trajectories: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    sensitivity: SensitivityConfig = dataclasses.field(default_factory=SensitivityConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    out: Path = option(Path("runs/transfer"), "run folder")
    seed: int = option(0, "seed of everything random")
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        if self.experts.low_noise_model is not None and self.teacher.model is None:
            raise SettingError(
                "{low_noise_model} was given without {model}; give {model} the high-noise expert",
                "low_noise_model",
                "model",
            )
        frozen_weights = self.teacher.frozen_weights
        if frozen_weights.offload_blocks and self.experts.low_noise_model is not None:
            raise SettingError(
                f"{{offload_blocks}} {frozen_weights.offload_blocks} was given with "
                "{low_noise_model}; one of two experts waits in CPU memory as a whole: leave it "
                "out",
                "offload_blocks",
                "low_noise_model",
            )
        trained_by = "parameters" if self.student.parameters == "full" else ""
        check_frozen_weights(frozen_weights, self.training, trained_by)


def check_frozen_weights(
    frozen_weights: FrozenConfig, training: TrainingConfig, all_trained_by: str = ""
) -> None:
    """Raise SettingError for settings of a training that contradict one another.

    all_trained_by: the field whose "full" trains whole weights; "" where they are frozen.
    """
    if frozen_weights.given and all_trained_by:
        raise SettingError(
            f"{frozen_weights.given} was given with {{{all_trained_by}}} full, which trains whole "
            "weights in fp32; only frozen ones can be held otherwise: leave one of them out",
            all_trained_by,
        )
    if not frozen_weights.offload_blocks:
        return
    fields = ("offload_blocks", "activation_checkpointing", "compile")
    given = f"{{offload_blocks}} {frozen_weights.offload_blocks}"
    if not training.activation_checkpointing:
        raise SettingError(
            f"{given} was given without {{activation_checkpointing}}; the backward pass would keep "
            "the weights of all blocks on the device: give both",
            *fields,
        )
    if training.compile:
        raise SettingError(
            f"{given} and {{compile}} given; they do not work together: leave one out", *fields
        )


def check_offload_alone(frozen_weights: FrozenConfig, num_processes: int) -> None:
    """Raise SettingError where several processes would offload blocks."""
    if frozen_weights.offload_blocks and num_processes > 1:
        raise SettingError(
            f"{{offload_blocks}} {frozen_weights.offload_blocks} was given to {num_processes} "
            "processes, which hold a part of each block already: leave it out",
            "offload_blocks",
        )
