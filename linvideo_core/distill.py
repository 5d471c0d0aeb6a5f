"""Distil a linearized model to a few steps: `python -m linvideo_core.distill`.

Without arguments the embedded model's own file is distilled on whatever machine this is.
    python -m linvideo_core.distill --preset gpu
    python -m linvideo_core.distill --model wan.safetensors --prompts prompts.safetensors \\
        --artifact linearized.safetensors --guidance-scale 5 --real-guidance-scale 5 --shift 5
Repeating a command continues where it stopped. The run folder holds config.json, the sampled
trajectories, metrics, checkpoints, the result, distilled.safetensors, and the evidence: pictures
and evaluation.json, which compare steps against quality.
"""

import dataclasses
import datetime
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, parallel, report
from . import artifact as artifact_files
from .adapters import blocks, shapes_of
from .artifact import Artifact
from .comparison import (
    EVALUATION_NAME,
    STEPS_NAME,
    compare_few_step,
    read_evaluation,
    save_comparison,
)
from .config import option, parse, run_command, to_json
from .devices import device_option, precision_option, resolve_device, resolve_precision
from .distillation import (
    DistillationConfig,
    DistillationTask,
    check_batch,
    make_student,
    start_from,
)
from .evidence import EvidenceConfig, compare_config, is_evaluated
from .flow import make_sigmas
from .health import Health
from .held import check_held
from .lineup import line_up
from .preflight import check_distillation
from .progress import Progress, TqdmProgress, silent
from .run_folder import CONFIG_NAME, check_run, open_run, read_metrics
from .stages import load_first_stage, name_of
from .student import Student, accelerated
from .subject import Subject, SubjectConfig, load_subject, open_subject
from .tables import show_table
from .teacher_videos import Endings, measure_likeness
from .team import ALONE, Team
from .training import TrainingConfig, fit
from .trajectories import TrajectoryConfig, collect
from .warm_start import WarmStartConfig, fit_feature_maps

logger = logging.getLogger(__name__)

ARTIFACT_NAME = "distilled.safetensors"

# What a repeated command may change: none of it decides the artifact.
_FREE_FIELDS = ("out", "offload_blocks", "evaluate_samples", "evaluate_batch_size")
_SHOWN = ("model", "steps", "digit", "motion", "motion_energy", "frechet", "seconds_per_video")
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    "samples.gif": "the same videos by the teacher and the others, at all steps and at few",
    "samples.png": "their frames side by side",
    STEPS_NAME: "quality by number of steps",
    "losses.png": "how training went",
    EVALUATION_NAME: "every measure",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides the result of a distillation."""

    subject: SubjectConfig = dataclasses.field(default_factory=SubjectConfig)
    trajectories: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evidence: EvidenceConfig = dataclasses.field(default_factory=EvidenceConfig)
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
        if self.subject.model is not None and self.artifact is None:
            raise ValueError("--model was given without --artifact; give the file made for it")
        by = "--train full" if self.distillation.train == "full" else ""
        check_held(self.subject.held, self.training, by)


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "num_trajectories": 8,
        "warm_start_steps": 40,
        "steps": 400,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "map_learning_rate": 1e-4,
        "critic_learning_rate": 2e-4,
        "warmup_steps": 10,
        "ema_decay": 0.9,
        "checkpoint_every": 50,
        "log_every": 5,
    },
    "gpu": {
        "out": Path("runs/distill-gpu"),
        "num_trajectories": 256,
        "shard_size": 256,
        "warm_start_steps": 300,
        "steps": 1000,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "map_learning_rate": 5e-4,
        "critic_learning_rate": 1e-3,
        "critic_steps": 3,
        "warmup_steps": 50,
        "ema_decay": 0.98,
        "cuda_graphs": True,
        "checkpoint_every": 250,
        "log_every": 10,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
}


def run(config: DistillConfig, progress: Progress = silent, team: Team = ALONE) -> Path:
    """Run every stage that `config.out` does not hold yet; return the artifact's path.

    team: the processes that train together; what follows on training is the first one's alone.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input, or when training goes
    wrong; its last good checkpoint is kept.
    """
    path = config.out / ARTIFACT_NAME
    is_made = path.exists() and (config.out / CONFIG_NAME).exists()
    if is_made:
        open_run(config.out, config, ignore=_FREE_FIELDS)
        if is_evaluated(config.evidence, config.out):
            logger.info("%s is finished: nothing was left to do", config.out)
            return path
    team.check_batch(config.training.batch_size)
    device = team.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    first = load_first_stage(config.artifact)
    check_run(config.out, config, ignore=_FREE_FIELDS)
    draft = open_subject(config.subject)
    if draft is not None:
        check_distillation(draft, config, first, device, precision, team.size)
    with team.in_turn():
        subject = load_subject(draft or config.subject, config.out, device, progress).to(device)
    artifact_files.check(first, shapes_of(subject.model))
    if not is_made:
        student = make_student(subject, first, config.distillation, seed=config.seed)
        with team.in_turn():
            open_run(config.out, config, ignore=_FREE_FIELDS)
        artifact_files.warn_of_other_weights(first, subject.model, student.sites)
        distill(student, subject, first, config, precision, progress, team)
    if team.disband() and not is_evaluated(config.evidence, config.out):
        logger.info("comparing %s with its teacher on %s in %s", path, device, precision)
        made = artifact_files.load(path)
        settings = compare_config(config.evidence, config.trajectories)
        lineup = line_up(subject.model, first, {name_of(made): made}, settings)
        how = {"seed": config.seed, "precision": precision, "progress": progress}
        comparison = compare_few_step(subject, lineup, settings, **how)
        save_comparison(comparison, config.out)
    return path


def distill(
    student: Student,
    subject: Subject,
    first: Artifact,
    config: DistillConfig,
    precision: str,
    progress: Progress,
    team: Team = ALONE,
) -> None:
    """Sample the teacher, train the student for few steps, save the artifact in `config.out`."""
    device = subject.prompt_embeds.device
    logger.info("distilling %s on %s in %s, into %s", subject.name, device, precision, config.out)
    trajectories = collect(
        subject,
        config.trajectories,
        config.out / "trajectories",
        seed=config.seed,
        precision=precision,
        progress=progress,
        team=team,
    )
    if config.single_stage:
        fit_feature_maps(
            student.model,
            student.mixed,
            subject,
            trajectories,
            config.warm_start,
            config.training,
            config.out / "warm_start",
            prompt_dropout=0.0,
            precision=precision,
            seed=config.seed,
            progress=progress,
            team=team,
        )
    else:
        start_from(student, first)
    endings = None
    if config.distillation.regression_weight:
        sigmas = make_sigmas(config.distillation.num_steps, config.trajectories.shift)
        endings = Endings(trajectories, float(sigmas[-2]))
    task = DistillationTask(
        student,
        subject,
        measure_likeness(trajectories),
        config.distillation,
        training=config.training,
        shift=config.trajectories.shift,
        precision=precision,
        seed=config.seed,
        endings=endings,
        team=team,
    )
    folder = config.out / "training"
    depths = [blocks(model, student.sites) for model in task.models]
    told = {"progress": progress, "watch": Health()}
    with (
        accelerated(task.models, student, config.training, team),
        team.sharded(task.models, depths),
    ):
        fit(task, config.training, folder, seed=config.seed, team=team, **told)
    if not team.is_first:
        return
    report.plot_losses(read_metrics(folder / "metrics.jsonl"), config.out / "losses.png")
    made = artifact_files.extract(
        student.model,
        subject.model,
        parameters=config.distillation.train,
        objective="dmd2",
        steps=config.training.steps,
        provenance=provenance(config, subject, first),
        sigmas=task.sigmas.tolist(),
    )
    artifact_files.save(made, config.out / ARTIFACT_NAME)


def provenance(config: DistillConfig, subject: Subject, first: Artifact) -> dict[str, Any]:
    """Say where an artifact comes from, for its header: this stage, then the one before it."""
    mine = {
        "linvideo": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": subject.name,
        "stages": 1 if config.single_stage else 2,
        "guidance_scale": config.distillation.real_guidance_scale,
        "shift": config.trajectories.shift,
        "seed": config.seed,
        **config.subject.held.provenance,
    }
    before = {
        **first.header.provenance,
        "objective": first.header.objective,
        "steps": first.header.steps,
    }
    return mine | {f"transfer {name}": value for name, value in before.items()}


def summarize(config: DistillConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    lines = []
    if config.evidence.evaluate_samples and (found := read_evaluation(config.out)):
        rows = [{key: row[key] for key in _SHOWN if key in row} for row in found["rows"]]
        lines += [show_table(rows), ""]
    lines.append(f"{config.out} holds")
    for name, meaning in _FILES.items():
        if (config.out / name).exists():
            lines.append(f"  {name:<24}{meaning}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, distil with progress bars, say what was made."""
    team = parallel.assemble()
    with team.in_turn():
        config, is_dry_run = parse(
            DistillConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
        )
    if is_dry_run:
        sys.stdout.write(to_json(config) if team.is_first else "")
        return
    try:
        with TqdmProgress(is_shown=team.is_first) as progress:
            run(config, progress, team)
    except KeyboardInterrupt:
        if team.is_first:
            sys.stderr.write("interrupted; the same command continues from the last checkpoint\n")
        sys.exit(130)
    if team.is_first:
        sys.stdout.write(f"\n{summarize(config)}")


if __name__ == "__main__":
    run_command(parallel.together(main))
