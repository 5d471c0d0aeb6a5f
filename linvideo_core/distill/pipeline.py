"""The stages of a distillation, from a linearized file to its few-step one, in order."""

import dataclasses
import datetime
import logging
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .. import artifact as artifact_files
from ..artifact import Artifact
from ..flow import make_sigmas
from ..run.config import option
from ..run.context import Run
from ..run.devices import device_option, precision_option
from ..run.errors import SettingError
from ..teacher.teacher import Teacher, TeacherConfig
from ..teacher.trajectories import Trajectories, TrajectoryConfig, collect, find_usage
from ..training.trainer import TrainingConfig, fit
from ..transfer.config import check_frozen_weights
from ..transfer.evaluation import EvaluationConfig
from ..transfer.student import Student, accelerated
from ..transfer.warm_start import WarmStartConfig, fit_feature_maps
from .monitor import TrainingMonitor
from .task import DistillationConfig, DistillationTask, check_batch, start_from
from .teacher_statistics import Endpoints, measure_statistics

logger = logging.getLogger(__name__)

ARTIFACT_NAME = "distilled.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides the result of a distillation."""

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
    seed: int = option(0, "seed of everything random")
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        check_batch(self.distillation, self.training)
        if self.teacher.model is not None and self.artifact is None:
            raise SettingError(
                "{model} was given without {artifact}; give the file made for it",
                "artifact",
                "model",
            )
        by = "train" if self.distillation.train == "full" else ""
        check_frozen_weights(self.teacher.frozen_weights, self.training, by)


def distill(
    student: Student, teacher: Teacher, first: Artifact, config: DistillConfig, run: Run
) -> None:
    """Train a student of `make_student` for few steps; save the artifact in the run's folder.

    first: the linearized file that it starts from.
    """
    logger.info("distilling %s on %s in %s, into %s", teacher.name, run.device, run.precision,
                run.folder)  # fmt: skip
    with student.disabled():
        trajectories = collect(teacher, config.trajectories, run)
    if config.single_stage:
        fit_feature_maps(
            student.model,
            student.mixed,
            teacher,
            trajectories,
            config.warm_start,
            config.training,
            run.below("warm_start"),
            prompt_dropout=0.0,
        )
    else:
        start_from(student, first)
    task = _train(student, teacher, trajectories, config, run)
    if run.processes.is_first:
        made = artifact_files.extract(
            student.model,
            teacher.model,
            parameters=config.distillation.train,
            objective="dmd2",
            steps=config.training.steps,
            provenance=provenance(config, teacher, first),
            sigmas=task.sigmas.tolist(),
            usage=dataclasses.replace(
                find_usage(teacher, config.trajectories),
                guidance_scale=1.0,
                steps=config.distillation.num_steps,
                sampler="lcm",
            ),
        )
        artifact_files.save(made, run.folder / ARTIFACT_NAME)


def _train(
    student: Student, teacher: Teacher, trajectories: Trajectories, config: DistillConfig, run: Run
) -> DistillationTask:
    """Train the student against its critic; return the finished task."""
    endpoints = None
    if config.distillation.regression_weight:
        sigmas = make_sigmas(config.distillation.num_steps, config.trajectories.shift)
        endpoints = Endpoints(trajectories, float(sigmas[-2]))
    task = DistillationTask(
        student,
        teacher,
        measure_statistics(trajectories),
        config.distillation,
        training=config.training,
        shift=config.trajectories.shift,
        run=run,
        endpoints=endpoints,
    )
    try:
        with accelerated(task.models, student, config.training, run):
            where = run.below("training")
            fit(task, config.training, where, stage="distillation", monitor=TrainingMonitor())
    finally:
        task.remove_critic()
    return task


def provenance(config: DistillConfig, teacher: Teacher, first: Artifact) -> dict[str, Any]:
    """Say where an artifact comes from, for its header: this stage, then the one before it."""
    mine = {
        "linvideo": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": teacher.name,
        "stages": 1 if config.single_stage else 2,
        "real_guidance_scale": config.distillation.real_guidance_scale,
        "seed": config.seed,
        **config.teacher.frozen_weights.provenance,
    }
    said = first.header.usage.said
    before = {
        **first.header.provenance,
        **{name: said[name] for name in ("guidance_scale", "shift") if name in said},
        "objective": first.header.objective,
        "steps": first.header.steps,
    }
    return mine | {f"transfer {name}": value for name, value in before.items()}
