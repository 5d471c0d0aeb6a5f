"""The stages of a distillation, from a linearized file to its few-step one, in order."""

import dataclasses
import datetime
import logging
from typing import Any

import torch

from .. import __version__
from .. import artifact as artifact_files
from ..artifact import Artifact
from ..flow import make_sigmas
from ..run.context import Run
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories, collect, find_usage
from ..training.trainer import fit
from ..transfer.student import Student, accelerated
from ..transfer.warm_start import fit_feature_maps
from .config import ARTIFACT_NAME, DistillConfig
from .monitor import TrainingMonitor
from .task import DistillationTask, start_from
from .teacher_statistics import Endpoints, measure_statistics

logger = logging.getLogger(__name__)


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
            parameters=config.distillation.parameters,
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
