"""One run of the command: check, train, compare, and say what was made."""

import logging
from pathlib import Path

from .. import artifact as artifact_files
from ..evaluate import plots
from ..evaluate.autoencoder import find_autoencoder, with_decoder
from ..evaluate.card import CARD_NAME, SAMPLES_NAMES, write_card
from ..evaluate.compare import (
    EVALUATION_NAME,
    STEPS_NAME,
    compare_few_step,
    load_linearized,
    name_of,
    read_evaluation,
    save_comparison,
)
from ..run.callbacks import Callbacks
from ..run.context import Run
from ..run.folder import open_run, read_metrics
from ..run.lock import locked
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.teacher import open_teacher
from ..transfer.command import (
    FREE_FIELDS,
    begin_run,
    compare_config,
    is_evaluated,
    is_made,
    run_with_bars,
    show_results,
)
from ..transfer.config import TRAINING_NAME
from .config import ARTIFACT_NAME, DistillConfig
from .pipeline import distill
from .preflight import check_distillation, forecast
from .task import make_student

logger = logging.getLogger(__name__)

_SHOWN = ("model", "steps", "digit", "motion", "motion_energy", "frechet")
_SHOWN += ("seconds_per_video", "speedup")
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    **dict.fromkeys(
        SAMPLES_NAMES, "the same videos by the teacher and the others, at all steps and at few"
    ),
    "samples.png": "their frames side by side",
    STEPS_NAME: "quality by number of steps",
    "losses.png": "how training went",
    EVALUATION_NAME: "every measure",
    CARD_NAME: "the model card, to publish the file with",
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
    run = begin_run(config, [path], callbacks, processes)
    if run is not None:
        with locked(config.out, processes):
            _make_and_compare(config, path, run)
    return path


def _make_and_compare(config: DistillConfig, path: Path, run: Run) -> None:
    processes = run.processes
    first = load_linearized(config.artifact)
    autoencoder = find_autoencoder(config.evaluation.vae, config.teacher.model)
    found = open_teacher(config.teacher)
    footprint = check_distillation(found, config, first, run.device, run.precision, processes.size)
    with processes.in_turn():
        teacher = found.load(run).to(run.device)
    if not is_made(config.out, [path]):
        if not (config.out / TRAINING_NAME).exists():
            forecast(teacher, config, run, footprint)
        with make_student(teacher, first, config.distillation, seed=config.seed) as student:
            with processes.in_turn():
                open_run(config.out, config, ignore=FREE_FIELDS)
            artifact_files.warn_of_other_weights(first, teacher.model)
            distill(student, teacher, first, config, run)
    metrics_path = config.out / TRAINING_NAME / "metrics.jsonl"
    if processes.is_first and metrics_path.exists():
        plots.plot_losses(read_metrics(metrics_path), config.out / "losses.png")
    if not processes.destroy():
        return
    made = artifact_files.load(path)
    if not is_evaluated(config.evaluation, config.out):
        logger.info("comparing %s with its teacher on %s in %s", path, run.device, run.precision)
        settings = compare_config(config.evaluation, config.trajectories)
        how = {"seed": run.seed, "precision": run.precision, "callbacks": run.callbacks}
        teacher = with_decoder(teacher, autoencoder)
        comparison = compare_few_step(teacher, first, {name_of(made): made}, settings, **how)
        save_comparison(comparison, config.out)
    write_card(config.out, {path: made}, read_evaluation(config.out))


def summarize(config: DistillConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    return show_results(config, _SHOWN, _FILES)


def main(config: DistillConfig) -> None:
    """Run the distillation with progress bars, on however many processes there are."""
    run_with_bars(config, run, summarize)
