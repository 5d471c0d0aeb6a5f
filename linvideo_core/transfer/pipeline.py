"""The stages of a transfer, from a teacher to its artifact, in order."""

import datetime
import logging
from collections.abc import Mapping
from typing import Any

import torch

from .. import __version__, artifact
from ..artifact import Artifact
from ..run.context import Run
from ..teacher.pool import TrajectoryPool
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories, collect, find_usage
from ..training.checkpoint import finished_steps
from ..training.trainer import fit
from .config import ARTIFACT_NAME, TRAINING_NAME, WARM_START_NAME, RunConfig, TransferConfig
from .layer_selection import choose_layers, rank_layers
from .student import Student, TransferTask, accelerated, make_pool
from .warm_start import fit_feature_maps

logger = logging.getLogger(__name__)


def linearize(
    student: Student,
    teacher: Teacher,
    config: TransferConfig,
    run: Run,
    trajectories: Trajectories | None = None,
    *,
    origin: Mapping[str, str] | None = None,
    task_type: type[TransferTask] = TransferTask,
) -> None:
    """Train a teacher's student and save its artifact in the run's folder.

    trajectories: the teacher's, where several runs share them; none: sampled now.
    origin: what the file's header says besides of where it comes from.
    task_type: the training, one of another objective's where it is not `config.objective`'s.
    """
    logger.info("linearizing %s on %s in %s, into %s", teacher.name, run.device, run.precision,
                run.folder)  # fmt: skip

    # 1. Sample the teacher: states of its trajectories, with its velocities there.
    if trajectories is None:
        trajectories = _sample_teacher(student, teacher, config, run)

    # 2. Warm start: fit every layer's linear attention to its own softmax attention.
    stored = (student.model, student.mixed, teacher, trajectories)
    fit_feature_maps(
        *stored,
        config.warm_start,
        config.training,
        run.below(WARM_START_NAME),
        prompt_dropout=config.objective.prompt_dropout,
    )

    # 3. Choose the layers, unless training does: by a rule, or by what each alone costs.
    ranking = []
    if config.selection.rule == "sensitivity":
        ranking = rank_layers(*stored, config.sensitivity, run, config.training.batch_size)
    linear_layers = choose_layers(config.selection, [*student.mixed], ranking)

    # 4. Train.
    task = task_type(
        student,
        teacher,
        trajectories,
        selection=config.selection,
        objective=config.objective,
        training=config.training,
        run=run,
        linear_layers=linear_layers,
    )
    with accelerated(task.models, student, config.training, run):
        fit(task, config.training, run.below(TRAINING_NAME))

    # 5. Save what the student has that its teacher has not.
    if run.processes.is_first:
        made = _make_artifact(student, teacher, config, origin or {})
        artifact.save(made, run.folder / ARTIFACT_NAME)


def _sample_teacher(
    student: Student, teacher: Teacher, config: TransferConfig, run: Run
) -> Trajectories | TrajectoryPool:
    if config.pool.states == "stored":
        with student.disabled():
            return collect(teacher, config.trajectories, run)
    pool = make_pool(student, teacher, config, run)
    if not any(finished_steps(run.folder / name) for name in (WARM_START_NAME, TRAINING_NAME)):
        pool.fill()
    return pool


def _make_artifact(
    student: Student, teacher: Teacher, config: TransferConfig, origin: Mapping[str, str]
) -> Artifact:
    choice = config.selection.rule
    if choice == "sensitivity":
        choice = f"{choice} ({config.sensitivity.sensitivity})"
    return artifact.extract(
        student.model,
        teacher.model,
        parameters=config.student.parameters,
        objective=config.objective.objective,
        steps=config.training.steps,
        provenance=provenance(config, teacher, choice=choice, **origin),
        usage=find_usage(teacher, config.trajectories),
    )


def provenance(config: RunConfig, teacher: Teacher, **more: Any) -> dict[str, Any]:
    """Say where an artifact comes from, for its header."""
    return {
        "linvideo": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": teacher.name,
        **more,
        "seed": config.seed,
        **config.teacher.frozen_weights.provenance,
    }
