"""The stages of a distillation, from a linearized file to its few-step one; `distill` runs them."""

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
from ..models.attention_sites import blocks
from ..run.config import option
from ..run.devices import device_option, precision_option
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import Progress
from ..teacher.teacher import Teacher, TeacherConfig
from ..teacher.trajectories import Trajectories, TrajectoryConfig, collect, find_usage
from ..training.trainer import TrainingConfig, fit
from ..transfer.evaluation import EvaluationConfig
from ..transfer.frozen_weights import check_frozen_weights
from ..transfer.student import Student, accelerated
from ..transfer.warm_start import WarmStartConfig, fit_feature_maps
from .monitor import TrainingMonitor
from .task import DistillationConfig, DistillationTask, check_batch, start_from
from .teacher_statistics import Endpoints, measure_likeness

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
            raise ValueError("--model was given without --artifact; give the file made for it")
        by = "--train full" if self.distillation.train == "full" else ""
        check_frozen_weights(self.teacher.frozen_weights, self.training, by)


def distill(
    student: Student,
    teacher: Teacher,
    first: Artifact,
    config: DistillConfig,
    precision: str,
    progress: Progress,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Sample the teacher, train the student for few steps, save the artifact in `config.out`."""
    device = teacher.prompt_embeds.device
    logger.info("distilling %s on %s in %s, into %s", teacher.name, device, precision, config.out)
    trajectories = collect(
        teacher,
        config.trajectories,
        config.trajectories.folder_beside(config.out),
        seed=config.seed,
        precision=precision,
        progress=progress,
        processes=processes,
    )
    if config.single_stage:
        fit_feature_maps(
            student.model,
            student.mixed,
            teacher,
            trajectories,
            config.warm_start,
            config.training,
            config.out / "warm_start",
            prompt_dropout=0.0,
            precision=precision,
            seed=config.seed,
            progress=progress,
            processes=processes,
        )
    else:
        start_from(student, first)
    task = train(student, teacher, trajectories, config, precision, progress, processes)
    if not processes.is_first:
        return
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
    artifact_files.save(made, config.out / ARTIFACT_NAME)


def train(
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    config: DistillConfig,
    precision: str,
    progress: Progress,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> DistillationTask:
    """Train the student against its critic for few steps; return the task that is done."""
    endings = None
    if config.distillation.regression_weight:
        sigmas = make_sigmas(config.distillation.num_steps, config.trajectories.shift)
        endings = Endpoints(trajectories, float(sigmas[-2]))
    task = DistillationTask(
        student,
        teacher,
        measure_likeness(trajectories),
        config.distillation,
        training=config.training,
        shift=config.trajectories.shift,
        precision=precision,
        seed=config.seed,
        endings=endings,
        processes=processes,
    )
    folder = config.out / "training"
    depths = [blocks(model, student.sites) for model in task.models]
    told = {"progress": progress, "monitor": TrainingMonitor()}
    with (
        accelerated(task.models, student, config.training, processes),
        processes.sharded(task.models, depths),
    ):
        fit(task, config.training, folder, seed=config.seed, processes=processes, **told)
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
