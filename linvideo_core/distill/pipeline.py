"""The stages of a distillation, from a linearized file to its few-step one, in order."""

import dataclasses
import logging
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..flow import make_sigmas
from ..run.context import Run
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories, collect, find_usage
from ..training.trainer import fit
from ..transfer.config import TRAINING_NAME, WARM_START_NAME
from ..transfer.pipeline import provenance
from ..transfer.student import Student, accelerated
from ..transfer.warm_start import fit_feature_maps
from .config import ARTIFACT_NAME, DistillConfig
from .task import DistillationTask, start_from
from .teacher_statistics import Endpoints, measure_statistics

logger = logging.getLogger(__name__)

# Of `TrainingMonitor`: rows remembered, needed before anything is said, and of a recent median.
_MEMORY = 50
_NEEDED = 10
_RECENT = 5
_SPIKE = 10.0
_COLLAPSED = 0.5
_WORDS = {
    "spread_ratio": "videos became alike: their variety",
    "motion_ratio": "videos came to a halt: their motion",
}


def distill(
    student: Student,
    teacher: Teacher,
    first: Artifact,
    config: DistillConfig,
    run: Run,
    *,
    task_type: type[DistillationTask] = DistillationTask,
) -> None:
    """Train a student of `make_student` for few steps; save the artifact in the run's folder.

    first: the linearized file that it starts from. task_type: the training; one of another kind
        has no monitor, which reads what a critic's logs.
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
            run.below(WARM_START_NAME),
            prompt_dropout=0.0,
        )
    else:
        start_from(student, first)
    task = _train(student, teacher, trajectories, config, run, task_type)
    if run.processes.is_first:
        made = artifact_files.extract(
            student.model,
            teacher.model,
            parameters=config.distillation.parameters,
            objective="dmd2",
            steps=config.training.steps,
            provenance=_provenance(config, teacher, first),
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
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    config: DistillConfig,
    run: Run,
    task_type: type[DistillationTask],
) -> DistillationTask:
    """Train the student against its critic; return the finished task."""
    endpoints = None
    if config.distillation.regression_weight:
        sigmas = make_sigmas(config.distillation.num_steps, config.trajectories.shift)
        endpoints = Endpoints(trajectories, float(sigmas[-2]))
    task = task_type(
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
            where = run.below(TRAINING_NAME)
            monitor = TrainingMonitor() if task_type is DistillationTask else None
            fit(task, config.training, where, stage="distillation", monitor=monitor)
    finally:
        task.remove_critic()
    return task


def _provenance(config: DistillConfig, teacher: Teacher, first: Artifact) -> dict[str, Any]:
    """Say where an artifact comes from, for its header: this stage, then the one before it."""
    said = first.header.usage.said
    before = {
        **first.header.provenance,
        **{name: said[name] for name in ("guidance_scale", "shift") if name in said},
        "objective": first.header.objective,
        "steps": first.header.steps,
    }
    mine = provenance(
        config,
        teacher,
        stages=1 if config.single_stage else 2,
        real_guidance_scale=config.distillation.real_guidance_scale,
    )
    return mine | {f"transfer {name}": value for name, value in before.items()}


class TrainingMonitor:
    """Tell a training that is going wrong from its metrics alone, before its result is lost.

    Generator and critic can spike, fall onto a few videos, or stand still: slow motion is the known
    flaw of distilled video models. `fit` asks it of every row of metrics.

    A spike: the critic's loss, median of the last 5 rows, is over 10 times its running median.
    A collapse: variety or motion, as shares of the teacher's, median of the last 5 rows, fall under
    half of the largest such median so far, as far as that was no more than the teacher's.
    """

    delay = _RECENT

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._recent = {name: deque(maxlen=_RECENT) for name in ("critic_loss", *_WORDS)}
        self._best = dict.fromkeys(_WORDS, 0.0)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Return what is wrong after this row, in a part of a sentence, or None."""
        faults = [self._find_spike(row), *(self._find_collapse(name, row) for name in _WORDS)]
        return next((fault for fault in faults if fault), None)

    def _find_spike(self, row: Mapping[str, Any]) -> str | None:
        usual = statistics.median(self._losses) if len(self._losses) >= _NEEDED else None
        self._losses.append(row["critic_loss"])
        recent = self._read("critic_loss", row)
        if usual is None or recent is None or recent <= _SPIKE * usual:
            return None
        return f"the critic's loss rose from {usual:.3g} to {recent:.3g}"

    def _find_collapse(self, name: str, row: Mapping[str, Any]) -> str | None:
        recent = self._read(name, row)
        if recent is None:
            return None
        self._best[name] = best = max(self._best[name], min(recent, 1.0))
        if recent >= _COLLAPSED * best:
            return None
        return f"the {_WORDS[name]} fell from {best:.2f} to {recent:.2f} of the teacher's"

    def _read(self, name: str, row: Mapping[str, Any]) -> float | None:
        """Return the median of the last readings with this one, None before there are enough."""
        recent = self._recent[name]
        recent.append(row[name])
        return statistics.median(recent) if len(recent) == _RECENT else None
