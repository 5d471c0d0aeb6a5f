"""The trainings of arms: stages of `linvideo_core`'s commands, in this process.

`transfer` and `distill` are those commands without what they say to a person (a forecast, pictures,
a card); the others differ from them by a task of `tasks` alone. What runs of a seed have in common
is made once, whichever of them comes first: the teacher's stored videos, and the warm start.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from linvideo_core.artifact import load
from linvideo_core.distill import cli as distill_cli
from linvideo_core.distill import config as distill_config
from linvideo_core.distill import pipeline as distill_pipeline
from linvideo_core.distill.task import DistillationTask, make_student
from linvideo_core.run.callbacks import Callbacks, Stage
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_device, resolve_precision
from linvideo_core.run.folder import open_run
from linvideo_core.run.lock import alone_in
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.training.checkpoint import finished_steps
from linvideo_core.transfer import cli as transfer_cli
from linvideo_core.transfer import config as transfer_config
from linvideo_core.transfer.command import FREE_FIELDS
from linvideo_core.transfer.config import WARM_START_NAME, RunConfig, TransferConfig
from linvideo_core.transfer.pipeline import linearize
from linvideo_core.transfer.student import Student, TransferTask, make_pool
from linvideo_core.transfer.warm_start import fit_feature_maps

from .evaluate import compiled
from .tasks import BlockFeatures, FromRanking, GuidedVelocity, KLPush, Regression


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A kind of training: how it reads its words and runs, its stage, its result's name.

    run: (config, callbacks, the folder of a warm start that is shared, or None).
    """

    read: Callable[[Sequence[str]], Any]
    run: Callable[[Any, Callbacks, Path | None], None]
    stage: Stage
    result: str


def transfer(
    config: TransferConfig,
    callbacks: Callbacks,
    shared: Path | None,
    *,
    task_type: type[TransferTask] = TransferTask,
) -> None:
    """Linearize a teacher; shared: a folder whose warm start runs of this one's states share."""
    run = _begin(config, callbacks)
    teacher = open_teacher(config.teacher, config.pool.sizes).load(run).to(run.device)
    open_run(config.out, config, ignore=FREE_FIELDS)
    stored = _store(teacher, config, run) if config.pool.states == "stored" else None
    with Student(teacher, config.student, seed=config.seed) as student:
        if shared is not None and config.warm_start.warm_start_steps:
            _share_warm_start(student, teacher, stored, config, run, shared)
        linearize(student, teacher, config, run, stored, task_type=task_type)


def distill(
    config: distill_config.DistillConfig,
    callbacks: Callbacks,
    shared: None,
    *,
    task_type: type[DistillationTask] = DistillationTask,
) -> None:
    """Distil a linearized file to few steps."""
    run = _begin(config, callbacks)
    teacher, first = open_teacher(config.teacher).load(run).to(run.device), load(config.artifact)
    open_run(config.out, config, ignore=FREE_FIELDS)
    _store(teacher, config, run)
    with make_student(teacher, first, config.distillation, seed=config.seed) as student:
        distill_pipeline.distill(student, teacher, first, config, run, task_type=task_type)


def store(config: RunConfig) -> None:
    """Sample the teacher's videos that runs of a seed share."""
    run = _begin(config, Callbacks())
    _store(open_teacher(config.teacher).load(run).to(run.device), config, run)


def _begin(config: RunConfig, callbacks: Callbacks) -> Run:
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    how = {"precision": precision, "seed": config.seed, "callbacks": callbacks}
    return Run(folder=config.out, device=device, **how)


def _store(teacher: Teacher, config: RunConfig, run: Run) -> Trajectories:
    """Sample the teacher's videos, which runs of a seed share: one process at a time does."""
    folder = config.trajectories.folder_beside(config.out) / f"seed-{config.seed}"
    with alone_in(folder), compiled(teacher.model, is_on=config.training.compile):
        return collect(teacher, config.trajectories, run)


def _share_warm_start(
    student: Student,
    teacher: Teacher,
    stored: Trajectories | None,
    config: TransferConfig,
    run: Run,
    shared: Path,
) -> None:
    """Put a finished warm start into the run's folder; do it in the shared one unless it is there.

    stored: the teacher's videos; None: of a pool, which it begins.
    """
    place = dataclasses.replace(run, folder=shared).below(WARM_START_NAME)
    with alone_in(shared):
        trajectories = stored
        if trajectories is None:
            trajectories = make_pool(student, teacher, config, run)
            if not finished_steps(place.folder):
                trajectories.fill()
        fit_feature_maps(
            student.model,
            student.mixed,
            teacher,
            trajectories,
            config.warm_start,
            config.training,
            place,
            prompt_dropout=config.objective.prompt_dropout,
        )
        target = run.folder / WARM_START_NAME
        if not target.exists():
            shutil.copytree(place.folder, target)


_TRANSFER = {
    "read": transfer_cli.read,
    "stage": "training",
    "result": transfer_config.ARTIFACT_NAME,
}
_DISTILL = {
    "read": distill_cli.read,
    "stage": "distillation",
    "result": distill_config.ARTIFACT_NAME,
}
TRAININGS = {
    "transfer": Training(run=transfer, **_TRANSFER),
    "block_features": Training(
        run=functools.partial(transfer, task_type=BlockFeatures), **_TRANSFER
    ),
    "guided_velocity": Training(
        run=functools.partial(transfer, task_type=GuidedVelocity), **_TRANSFER
    ),
    "from_ranking": Training(run=functools.partial(transfer, task_type=FromRanking), **_TRANSFER),
    "kl_push": Training(run=functools.partial(transfer, task_type=KLPush), **_TRANSFER),
    "distill": Training(run=distill, **_DISTILL),
    "regression": Training(run=functools.partial(distill, task_type=Regression), **_DISTILL),
}
"""Name -> training: of `Arm.training` or `Arm.second_training`."""
