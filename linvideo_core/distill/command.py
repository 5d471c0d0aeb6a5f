"""One run of the command: check, train, compare, and say what was made."""

import logging
from pathlib import Path

from .. import artifact as artifact_files
from ..evaluate import plots
from ..evaluate.compare import (
    EVALUATION_NAME,
    STEPS_NAME,
    compare_few_step,
    load_linearized,
    name_of,
    save_comparison,
)
from ..models.attention_sites import shapes_of
from ..run.callbacks import Callbacks
from ..run.context import Run
from ..run.devices import resolve_device, resolve_precision
from ..run.folder import CONFIG_NAME, check_run, open_run, read_metrics
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.teacher import open_teacher
from ..teacher.trajectories import USED_AGAIN
from ..transfer.command import FREE_FIELDS, list_files, run_with_bars, show_evaluation
from ..transfer.evaluation import compare_config, is_evaluated
from .config import ARTIFACT_NAME, DistillConfig
from .pipeline import distill
from .preflight import check_distillation
from .task import make_student

logger = logging.getLogger(__name__)

_SHOWN = ("model", "steps", "digit", "motion", "motion_energy", "frechet", "seconds_per_video")
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    "samples.gif": "the same videos by the teacher and the others, at all steps and at few",
    "samples.png": "their frames side by side",
    STEPS_NAME: "quality by number of steps",
    "losses.png": "how training went",
    EVALUATION_NAME: "every measure",
}


def run(
    config: DistillConfig,
    callbacks: Callbacks | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Run every stage that `config.out` does not hold yet; return the artifact's path.

    processes: that train together; what follows on training is the first one's alone.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input, or when training goes
    wrong; its last good checkpoint is kept.
    """
    path = config.out / ARTIFACT_NAME
    is_made = path.exists() and (config.out / CONFIG_NAME).exists()
    if is_made:
        open_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
        if is_evaluated(config.evaluation, config.out):
            logger.info("%s is finished: nothing was left to do", config.out)
            return path
    processes.check_batch(config.training.batch_size)
    device = processes.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    run = Run(
        folder=config.out,
        device=device,
        precision=precision,
        seed=config.seed,
        callbacks=callbacks or Callbacks(),
        processes=processes,
    )
    first = load_linearized(config.artifact)
    check_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
    found = open_teacher(config.teacher)
    check_distillation(found, config, first, device, precision, processes.size)
    with processes.in_turn():
        teacher = found.load(run).to(device)
    artifact_files.check(first, shapes_of(teacher.model))
    if not is_made:
        with make_student(teacher, first, config.distillation, seed=config.seed) as student:
            with processes.in_turn():
                open_run(config.out, config, ignore=FREE_FIELDS)
            artifact_files.warn_of_other_weights(first, teacher.model)
            distill(student, teacher, first, config, run)
    metrics_path = config.out / "training" / "metrics.jsonl"
    if processes.is_first and metrics_path.exists():
        plots.plot_losses(read_metrics(metrics_path), config.out / "losses.png")
    if processes.destroy() and not is_evaluated(config.evaluation, config.out):
        logger.info("comparing %s with its teacher on %s in %s", path, device, precision)
        made = artifact_files.load(path)
        settings = compare_config(config.evaluation, config.trajectories)
        how = {"seed": config.seed, "precision": precision, "callbacks": callbacks}
        comparison = compare_few_step(teacher, first, {name_of(made): made}, settings, **how)
        save_comparison(comparison, config.out)
    return path


def summarize(config: DistillConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    table = show_evaluation(config.out, config.evaluation, _SHOWN)
    lines = [table, ""] if table else []
    return "\n".join([*lines, *list_files(config.out, _FILES)]) + "\n"


def main(config: DistillConfig) -> None:
    """Run the distillation with progress bars, on however many processes there are."""
    run_with_bars(config, run, summarize)
