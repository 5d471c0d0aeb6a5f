"""Linearize a video model: `python -m linvideo_core.transfer`.

Without arguments the embedded model is linearized on whatever machine this is, in minutes.
    python -m linvideo_core.transfer --preset gpu
    python -m linvideo_core.transfer --model wan.safetensors --prompts prompts.safetensors
Repeating a command continues where it stopped. The run folder holds config.json, the sampled
trajectories, metrics, checkpoints, pictures, and the result: linearized.safetensors.
"""

import dataclasses
import datetime
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, artifact
from .adapters import compiled_blocks
from .config import option, parse, run_command, to_json
from .objectives import ObjectiveConfig
from .progress import Progress, TqdmProgress, silent
from .run_folder import open_run
from .selection import SelectionConfig, check_target
from .student import Student, StudentConfig, TransferTask
from .subject import Subject, SubjectConfig, load_subject
from .training import TrainingConfig, fit
from .trajectories import Trajectories, TrajectoryConfig, collect
from .warm_start import WarmStart, WarmStartConfig

logger = logging.getLogger(__name__)

ARTIFACT_NAME = "linearized.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Everything that decides the result of a transfer."""

    subject: SubjectConfig = dataclasses.field(default_factory=SubjectConfig)
    trajectories: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    out: Path = option(Path("runs/transfer"), "run folder")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    precision: str = option(
        "auto", "of the matrix products; auto: bf16 on cuda", choices=("auto", "fp32", "bf16")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "gpu": {
        "out": Path("runs/transfer-gpu"),
        "num_trajectories": 2048,
        "shard_size": 256,
        "warm_start_steps": 400,
        "steps": 9000,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 200,
        "ema_decay": 0.999,
        "parameters": "lora",
        "checkpoint_every": 1000,
        "log_every": 50,
    },
}


def resolve_device(name: str) -> str:
    """Return the device that "auto" stands for; refuse one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} given, which this machine lacks: {reason}") from error
    return name


def run(config: TransferConfig, progress: Progress = silent) -> Path:
    """Run every stage that `config.out` does not hold yet; return the artifact's path.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    device = resolve_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else "fp32"
    subject = load_subject(config.subject).to(device)
    student = Student(subject, config.student, seed=config.seed)
    check_target(config.selection, len(student.sites))
    open_run(config.out, config, ignore=("out",))
    logger.info("linearizing %s on %s in %s, into %s", subject.name, device, precision, config.out)
    trajectories = collect(
        subject,
        config.trajectories,
        config.out / "trajectories",
        seed=config.seed,
        precision=precision,
        progress=progress,
    )
    train(student, subject, trajectories, config, precision, progress)
    made = artifact.extract(
        student.model,
        subject.model,
        parameters=config.student.parameters,
        objective=config.objective.objective,
        steps=config.training.steps,
        provenance=provenance(config, subject),
    )
    path = config.out / ARTIFACT_NAME
    artifact.save(made, path)
    return path


def train(
    student: Student,
    subject: Subject,
    trajectories: Trajectories,
    config: TransferConfig,
    precision: str,
    progress: Progress,
) -> None:
    """Warm-start the feature maps, then select layers and train the student."""
    if config.warm_start.warm_start_steps:
        warm_start = WarmStart(
            student.model,
            student.mixed,
            subject,
            trajectories,
            batch_size=config.training.batch_size,
            prompt_dropout=config.objective.prompt_dropout,
            learning_rate=config.warm_start.warm_start_learning_rate,
            precision=precision,
        )
        settings = dataclasses.replace(
            config.training, steps=config.warm_start.warm_start_steps, accumulation=1
        )
        folder = config.out / "warm_start"
        fit(warm_start, settings, folder, seed=config.seed, stage="warm start", progress=progress)
    task = TransferTask(
        student,
        subject,
        trajectories,
        selection=config.selection,
        objective=config.objective,
        training=config.training,
        precision=precision,
    )
    compiled = [student.model, subject.model] if config.training.compile else []
    with compiled_blocks(compiled, student.sites):
        fit(task, config.training, config.out / "training", seed=config.seed, progress=progress)


def provenance(config: TransferConfig, subject: Subject) -> dict[str, Any]:
    """Say where an artifact comes from, for its header."""
    return {
        "linvideo": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": subject.name,
        "guidance_scale": config.trajectories.guidance_scale,
        "shift": config.trajectories.shift,
        "seed": config.seed,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run the transfer with progress bars."""
    config, is_dry_run = parse(
        TransferConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
    )
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    with TqdmProgress() as progress:
        path = run(config, progress)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    run_command(main)
