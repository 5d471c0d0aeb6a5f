"""Distil a linearized model to a few steps: `python -m linvideo_core.distill`.

Without arguments the embedded model's own file is distilled on whatever machine this is.
    python -m linvideo_core.distill --preset gpu
    python -m linvideo_core.distill --model wan.safetensors --prompts prompts.safetensors \\
        --artifact linearized.safetensors --guidance-scale 5 --real-guidance-scale 5 --shift 5
Repeating a command continues where it stopped. The run folder holds config.json, metrics,
checkpoints, the result, distilled.safetensors, and the evidence: pictures and evaluation.json,
which compare steps against quality. What the teacher sampled lies beside it, see `transfer`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import artifact as artifact_files
from ..evaluate import plots
from ..evaluate.compare import (
    EVALUATION_NAME,
    STEPS_NAME,
    compare_few_step,
    read_evaluation,
    save_comparison,
)
from ..evaluate.entrants import find_entrants, load_linearized, name_of
from ..models.attention_sites import shapes_of
from ..run.config import parse, to_json
from ..run.devices import resolve_device, resolve_precision
from ..run.folder import CONFIG_NAME, check_run, open_run, read_metrics
from ..run.memory import LOWER_RUN, explained
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import Progress, TqdmProgress, silent
from ..run.tables import show_table
from ..teacher.teacher import load_teacher, open_teacher
from ..teacher.trajectories import USED_AGAIN
from ..training import fsdp
from ..transfer.evaluation import compare_config, is_evaluated
from .pipeline import ARTIFACT_NAME, DistillConfig, distill
from .preflight import check_distillation
from .task import make_student

logger = logging.getLogger(__name__)

# What a repeated command may change: none of it decides the artifact.
_FREE_FIELDS = (
    "out",
    "teacher_folder",
    "shard_size",
    "offload_blocks",
    "evaluate_samples",
    "evaluate_batch_size",
)
_SHOWN = ("model", "steps", "digit", "motion", "motion_energy", "frechet", "seconds_per_video")
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    "samples.gif": "the same videos by the teacher and the others, at all steps and at few",
    "samples.png": "their frames side by side",
    STEPS_NAME: "quality by number of steps",
    "losses.png": "how training went",
    EVALUATION_NAME: "every measure",
}


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
        # Towards what the teacher's guided videos are as a whole, not to the most typical of them.
        "real_guidance_scale": 1.5,
        "regression_weight": 1.0,
        "warmup_steps": 50,
        "ema_decay": 0.98,
        "cuda_graphs": True,
        "checkpoint_every": 250,
        "log_every": 10,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
}


def run(
    config: DistillConfig, progress: Progress = silent, processes: ProcessGroup = SINGLE_PROCESS
) -> Path:
    """Run every stage that `config.out` does not hold yet; return the artifact's path.

    processes: that train together; what follows on training is the first one's alone.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input, or when training goes
    wrong; its last good checkpoint is kept.
    """
    path = config.out / ARTIFACT_NAME
    is_made = path.exists() and (config.out / CONFIG_NAME).exists()
    if is_made:
        open_run(config.out, config, ignore=_FREE_FIELDS, new_run=USED_AGAIN)
        if is_evaluated(config.evaluation, config.out):
            logger.info("%s is finished: nothing was left to do", config.out)
            return path
    processes.check_batch(config.training.batch_size)
    device = processes.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    first = load_linearized(config.artifact)
    check_run(config.out, config, ignore=_FREE_FIELDS, new_run=USED_AGAIN)
    draft = open_teacher(config.teacher)
    if draft is not None:
        check_distillation(draft, config, first, device, precision, processes.size)
    with processes.in_turn():
        teacher = load_teacher(draft or config.teacher, config.out, device, progress).to(device)
    artifact_files.check(first, shapes_of(teacher.model))
    if not is_made:
        student = make_student(teacher, first, config.distillation, seed=config.seed)
        with processes.in_turn():
            open_run(config.out, config, ignore=_FREE_FIELDS)
        artifact_files.warn_of_other_weights(first, teacher.model)
        distill(student, teacher, first, config, precision, progress, processes)
    metrics_path = config.out / "training" / "metrics.jsonl"
    if processes.is_first and metrics_path.exists():
        plots.plot_losses(read_metrics(metrics_path), config.out / "losses.png")
    if processes.destroy() and not is_evaluated(config.evaluation, config.out):
        logger.info("comparing %s with its teacher on %s in %s", path, device, precision)
        made = artifact_files.load(path)
        settings = compare_config(config.evaluation, config.trajectories)
        lineup = find_entrants(teacher.model, first, {name_of(made): made}, settings)
        how = {"seed": config.seed, "precision": precision, "progress": progress}
        comparison = compare_few_step(teacher, lineup, settings, **how)
        save_comparison(comparison, config.out)
    return path


def summarize(config: DistillConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    lines = []
    if config.evaluation.evaluate_samples and (found := read_evaluation(config.out)):
        rows = [{key: row[key] for key in _SHOWN if key in row} for row in found["rows"]]
        lines += [show_table(rows), ""]
    lines.append(f"{config.out} holds")
    for name, meaning in _FILES.items():
        if (config.out / name).exists():
            lines.append(f"  {name:<24}{meaning}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, distil with progress bars, say what was made."""
    processes = fsdp.init_process_group()
    with processes.in_turn():
        config, is_dry_run = parse(
            DistillConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
        )
    if is_dry_run:
        sys.stdout.write(to_json(config) if processes.is_first else "")
        return
    try:
        with TqdmProgress(is_shown=processes.is_first) as progress, explained(LOWER_RUN):
            run(config, progress, processes)
    except KeyboardInterrupt:
        if processes.is_first:
            sys.stderr.write("interrupted; the same command continues from the last checkpoint\n")
        sys.exit(130)
    if processes.is_first:
        sys.stdout.write(f"\n{summarize(config)}")


command = fsdp.together(main)
