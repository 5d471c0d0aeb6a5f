"""The settings of a transfer, and which of them contradict one another."""

import dataclasses
import re
from pathlib import Path
from typing import Protocol

from ..evaluate.config import vae_option
from ..models.config import ExpertsConfig, FrozenConfig, LinearForm
from ..run import limits
from ..run.config import Settings, option
from ..run.devices import device_option, precision_option
from ..run.errors import SettingError, shown_value
from ..run.limits import Limits
from ..teacher.config import PoolConfig, TeacherConfig, TrajectoryConfig
from ..training.config import TrainingConfig

ARTIFACT_NAME = "linearized.safetensors"
WARM_START_NAME = "warm_start"
TRAINING_NAME = "training"

PARAMETERS = ("full", "lora", "feature_maps")
CHOICES = ("learned", "alternate", "sensitivity")
MEASURES = ("replace-one", "restore-one")
OBJECTIVES = ("velocity", "adm")
LEVELS = ("even", "flow")
QUALITIES = ("draft", "standard", "best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(Settings):
    """What of the student is trained."""

    parameters: str = option("lora", "weights that are trained and saved", choices=PARAMETERS)
    lora_rank: int = option(32, "rank of the weight changes (parameters lora)", limits.LORA_RANK)
    feature_ratio: int = option(
        1, "features M of a query or key, in units of the head dim: 1 or 2", limits.FEATURE_RATIO
    )
    form: LinearForm = dataclasses.field(default_factory=LinearForm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig(Settings):
    """How long the feature maps are fitted before the weights move."""

    warm_start_steps: int = option(
        40, "steps of the layer-wise warm start; 0 leaves it out", limits.COUNT_OR_NONE
    )
    warm_start_learning_rate: float = option(
        1e-2, "peak learning rate of the warm start", limits.POSITIVE
    )


class _Target(Limits):
    """Numbers of layers, and speed-ups such as "1.6x"."""

    def takes(self, value: object) -> bool:
        return _read_speedup(value) is not None or super().takes(value)

    def __str__(self) -> str:
        return f"{super().__str__()}, or a speed-up above 1 such as 1.6x,"


def _read_speedup(value: object) -> float | None:
    found = (
        re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)x", value) if isinstance(value, str) else None
    )
    return float(found[1]) if found and float(found[1]) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig(Settings):
    """Which layers become linear or hybrid."""

    target: int | str = option(
        5,
        "layers to make linear or hybrid; or how many times as fast a call of the model is to be, "
        "such as 1.6x: as few layers as that needs, measured first, beside softmax layers by "
        "--softmax-kernel",
        _Target(**dataclasses.asdict(limits.LAYERS)),
    )
    choice: str = option(
        "learned",
        "what chooses them: training, every other layer, or what each alone does to the velocity",
        choices=CHOICES,
    )
    layers: str | None = option(None, "the layers themselves, such as 1,3,4, and no --choice")
    selection_share: float = option(
        0.3, "share of the training steps spent choosing layers", limits.FRACTION
    )
    layer_score_learning_rate: float = option(
        0.01, "learning rate of the layer scores r", limits.POSITIVE
    )
    selection_weight: float = option(
        0.01, "weight of the budget and rounding losses (lambda)", limits.LOSS_WEIGHT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self._check_list(self.layers)

    @property
    def speedup(self) -> float | None:
        """The speed-up that is the target; None where that is a number of layers."""
        return _read_speedup(self.target)

    @property
    def rule(self) -> str:
        """How the layers are chosen: the choice, or "listed"."""
        return self.choice if self.layers is None else "listed"

    @property
    def listed(self) -> tuple[int, ...]:
        """The layers of the list, in depth order; none without one."""
        return tuple(sorted(map(int, self.layers.split(",")))) if self.layers is not None else ()

    def _check_list(self, text: str) -> None:
        words = [word.strip() for word in text.split(",")]
        are_numbers = all(re.fullmatch("[0-9]{1,3}", word) for word in words)
        if not are_numbers or len({*map(int, words)}) < len(words):
            raise SettingError(
                f"{{layers}} {shown_value(text)} given; different layer numbers, "
                "such as 1,3,4, are needed",
                "layers",
            )
        if self.choice != "learned":
            raise SettingError(
                f"{{layers}} {text} and {{choice}} {self.choice} given; leave one of them out",
                "layers",
                "choice",
            )
        if len(words) != self.target:
            raise SettingError(
                f"{{layers}} {text} names {len(words)} layers and {{target}} is {self.target}; "
                f"give {{target}} {len(words)}, or another list",
                "layers",
                "target",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig(Settings):
    """How the layers are ranked where `choice` asks for it."""

    sensitivity: str = option(
        "replace-one", "one linear layer among softmax ones, or the reverse", choices=MEASURES
    )
    sensitivity_videos: int = option(
        8, "stored videos to rank the layers on, or all there are", limits.VIDEOS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """Which states the student is trained at; the loss is always the velocity's squared error."""

    objective: str = option(
        "velocity",
        "train at the teacher's states alone, or also at those that the student reaches",
        choices=OBJECTIVES,
    )
    max_jump: int = option(
        6,
        "grid points that the student moves at most before it is compared",
        limits.SAMPLER_STEPS,
    )
    anchor_share: float = option(
        0.5, "share of a batch that adm compares where it was stored", limits.FRACTION
    )
    levels: str = option(
        "flow", "noise levels drawn as the flow carries errors, or evenly", choices=LEVELS
    )
    prompt_dropout: float = option(
        0.3, "share of a batch that trains the unconditional branch", limits.FRACTION
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """Comparison with the teacher at the end."""

    evaluate_samples: int = option(
        8,
        "videos that each model samples in the end; 0: no comparison",
        dataclasses.replace(limits.COMPARED_VIDEOS, or_zero=True),
    )
    evaluate_batch_size: int = option(8, "videos sampled together in the end", limits.VIDEOS)
    vae: Path | None = vae_option()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig(Settings):
    """What decides settings that no flag gives."""

    quality: str = option(
        "standard", "how long it learns, and from how many videos if stored", choices=QUALITIES
    )
    card: int = option(
        0,
        "with --model: GB of the GPU that it must fit; 0: as much as this machine's has",
        limits.COUNT_OR_NONE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(Settings):
    """The run."""

    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    trajectories: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    sensitivity: SensitivityConfig = dataclasses.field(default_factory=SensitivityConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    estimate: bool = option(
        False, "measure a few calls, say what each quality takes on this machine, and stop"
    )
    out: Path = option(Path("runs/transfer"), "run folder")
    seed: int = option(0, "seed of everything random", limits.SEED)
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts.low_noise_model is not None and self.teacher.model is None:
            raise SettingError(
                "{low_noise_model} was given without {model}; give {model} the high-noise expert",
                "low_noise_model",
                "model",
            )
        if self.pool.states == "pool":
            self._check_pool()
        if self.pool.more_sizes and (self.teacher.model is None or self.pool.states != "pool"):
            raise SettingError(
                f"{{more_sizes}} {self.pool.more_sizes} given; it is for the pool of a {{model}} "
                "of your own: give {model} and {states} pool, or leave {more_sizes} out",
                "more_sizes",
                "model",
                "states",
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
        if self.selection.speedup is None:
            self.teacher.softmax.check_training()

    def _check_pool(self) -> None:
        """Raise SettingError for what only stored videos can serve."""
        others = {
            "low_noise_model": self.experts.low_noise_model is not None,
            "choice": self.selection.rule == "sensitivity",
            "levels": self.objective.levels != "even",
        }
        for name in (name for name, is_given in others.items() if is_given):
            what = {
                "choice": "{choice} sensitivity, which ranks layers on stored videos",
                "levels": f"{{levels}} {self.objective.levels}, while a pool's videos pass all "
                "noise levels alike",
            }.get(name, f"{{{name}}}, whose two experts share stored videos")
            raise SettingError(
                f"{{states}} pool was given with {what}: give {{states}} stored, or leave it out",
                "states",
                name,
            )


class RunConfig(Protocol):
    """What the settings of a transfer and of a distillation have in common."""

    teacher: TeacherConfig
    trajectories: TrajectoryConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    out: Path
    seed: int
    device: str
    precision: str


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
            "frozen",
            "offload_blocks",
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
