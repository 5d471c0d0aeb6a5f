"""The stages of a transfer, from a teacher to its artifact; `transfer` is their command.

Trajectories, warm start, selection, objective, training: each stage is a room of its own, and here
is the order in which one hands on to the next.
"""

import dataclasses
import datetime
import logging
from pathlib import Path
from typing import Any

import torch

from .. import __version__, artifact
from ..models.attention_sites import blocks
from ..models.experts import ExpertsConfig
from ..run.config import option
from ..run.devices import device_option, precision_option
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import Progress
from ..teacher.teacher import Teacher, TeacherConfig
from ..teacher.trajectories import Trajectories, TrajectoryConfig, collect, find_usage
from ..training.trainer import TrainingConfig, fit
from .evaluation import EvaluationConfig
from .frozen_weights import check_frozen_weights
from .layer_selection.rules import SelectionConfig, choose_layers
from .layer_selection.sensitivity import RANKING_NAME, SensitivityConfig, measure, rank
from .objectives import ObjectiveConfig, needs_critic
from .student import Student, StudentConfig, TransferTask, accelerated
from .warm_start import WarmStartConfig, fit_feature_maps

logger = logging.getLogger(__name__)

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
            raise ValueError(
                "--low-noise-model was given without --model; give --model the high-noise expert"
            )
        frozen_weights = self.teacher.frozen_weights
        if frozen_weights.offload_blocks and self.experts.low_noise_model is not None:
            raise ValueError(
                f"--offload-blocks {frozen_weights.offload_blocks} was given with "
                "--low-noise-model; one of two experts waits in CPU memory as a whole: leave it out"
            )
        is_full = self.student.parameters == "full"
        by = "--parameters full" if is_full else ""
        if needs_critic(self.objective):
            by = f"--objective {self.objective.objective}"
        check_frozen_weights(frozen_weights, self.training, by)


def linearize(
    student: Student,
    teacher: Teacher,
    config: TransferConfig,
    precision: str,
    progress: Progress,
    trajectories: Trajectories | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Sample the teacher, train its student, save the artifact in `config.out`.

    trajectories: the teacher's, where several runs share them; none: sampled into `config.out`.
    process group: the processes that do it together, each with a teacher and a student of its own.
    """
    device = teacher.prompt_embeds.device
    logger.info("linearizing %s on %s in %s, into %s", teacher.name, device, precision, config.out)
    if trajectories is None:
        trajectories = collect(
            teacher,
            config.trajectories,
            config.trajectories.folder_beside(config.out),
            seed=config.seed,
            precision=precision,
            progress=progress,
            processes=processes,
        )
    train(student, teacher, trajectories, config, precision, progress, processes)
    if not processes.is_first:
        return
    made = artifact.extract(
        student.model,
        teacher.model,
        parameters=config.student.parameters,
        objective=config.objective.objective,
        steps=config.training.steps,
        provenance=provenance(config, teacher),
        usage=find_usage(teacher, config.trajectories),
    )
    artifact.save(made, config.out / ARTIFACT_NAME)


def train(
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    config: TransferConfig,
    precision: str,
    progress: Progress,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Warm-start the feature maps, then select layers, before or while the student trains."""
    fit_feature_maps(
        student.model,
        student.mixed,
        teacher,
        trajectories,
        config.warm_start,
        config.training,
        config.out / WARM_START_NAME,
        prompt_dropout=config.objective.prompt_dropout,
        precision=precision,
        seed=config.seed,
        progress=progress,
        processes=processes,
    )
    ranking = rank_layers(student, teacher, trajectories, config, precision, progress, processes)
    task = TransferTask(
        student,
        teacher,
        trajectories,
        selection=config.selection,
        objective=config.objective,
        training=config.training,
        precision=precision,
        layers=choose_layers(config.selection, list(student.mixed), config.seed, ranking),
        ranking=ranking,
        processes=processes,
    )
    folder = config.out / TRAINING_NAME
    depths = [blocks(model, student.sites) for model in task.models]
    with (
        accelerated(task.models, student, config.training, processes),
        processes.sharded(task.models, depths),
    ):
        fit(task, config.training, folder, seed=config.seed, progress=progress, processes=processes)


def rank_layers(
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    config: TransferConfig,
    precision: str,
    progress: Progress,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[int] | None:
    """Return the layers from the least to the most sensitive; None where nothing asks for it.

    They are measured in the warm-started student, whose weights are still the teacher's.
    """
    if not config.selection.needs_ranking:
        return None
    errors = measure(
        student.model,
        student.mixed,
        teacher,
        trajectories,
        config.sensitivity,
        config.out / RANKING_NAME,
        batch_size=config.training.batch_size,
        precision=precision,
        progress=progress,
        processes=processes,
    )
    return rank(errors, config.sensitivity)


def provenance(config: TransferConfig, teacher: Teacher) -> dict[str, Any]:
    """Say where an artifact comes from, for its header."""
    choice = config.selection.rule
    if config.selection.needs_ranking:
        start = ", scores started from ranking" if choice == "learned" else ""
        choice = f"{choice}{start} ({config.sensitivity.sensitivity})"
    return {
        "linvideo": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": teacher.name,
        "choice": choice,
        "seed": config.seed,
        **config.teacher.frozen_weights.provenance,
    }
