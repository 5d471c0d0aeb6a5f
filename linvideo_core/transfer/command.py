"""One run of the command: check, train, compare, and say what was made."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .. import artifact
from ..evaluate.compare import (
    EVALUATION_NAME,
    Comparison,
    compare_artifact,
    compare_experts,
    read_evaluation,
    save_comparison,
)
from ..models.experts import HIGH, LOW
from ..run.callbacks import Callbacks
from ..run.context import Run
from ..run.devices import resolve_device, resolve_precision
from ..run.folder import CONFIG_NAME, check_run, open_run
from ..run.memory import LOWER_RUN, explained
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import TerminalCallbacks
from ..run.tables import show_table
from ..teacher.teacher import Teacher, open_teacher
from ..teacher.trajectories import USED_AGAIN
from ..training.fsdp import run_together
from .config import ARTIFACT_NAME, EvaluationConfig, TransferConfig
from .estimate import forecast
from .evaluation import compare_config, draw_training, is_evaluated
from .experts import EXPERT_NAMES, check_experts, linearize_experts, load_experts
from .layer_selection.rules import check_layers
from .layer_selection.sensitivity import RANKING_NAME
from .pipeline import linearize
from .preflight import Footprint, check_transfer
from .student import Student

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

# What a repeated command may change: none of it decides the artifact.
FREE_FIELDS = (
    "out",
    "teacher_folder",
    "shard_size",
    "offload_blocks",
    "evaluate_samples",
    "evaluate_batch_size",
)
_SHOWN = (
    "model",
    "linear_layers",
    "layers",
    "digit",
    "motion",
    "frechet",
    "motion_energy",
    "velocity_error",
    "seconds_per_video",
)
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    EXPERT_NAMES[HIGH]: "the LINVIDEO file of the high-noise expert",
    EXPERT_NAMES[LOW]: "the LINVIDEO file of the low-noise expert",
    "samples.gif": "the same videos by the teacher, before and after training",
    "samples.png": "their frames side by side",
    "layer_scores.png": "how training chose the layers",
    RANKING_NAME: "how much each layer alone changes the velocity",
    "losses.png": "how training went",
    "velocity_error.png": "how far the model is from its teacher, by noise level",
    EVALUATION_NAME: "every measure",
}


def run(
    config: TransferConfig,
    callbacks: Callbacks | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Run every stage that `config.out` does not hold yet; return the artifact's path.

    Of two experts that is the high-noise one's; `list_artifacts` has both.

    processes: that train together; what follows on training is the first one's alone.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    paths = list_artifacts(config)
    is_made = all(path.exists() for path in paths) and (config.out / CONFIG_NAME).exists()
    if is_made:
        open_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
        if is_evaluated(config.evaluation, config.out):
            logger.info("%s is finished: nothing was left to do", config.out)
            return paths[0]
    processes.check_batch(config.training.batch_size)
    device = processes.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    check_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
    make = _run_experts if config.experts.low_noise_model is not None else _run_one
    run = Run(
        folder=config.out,
        device=device,
        precision=precision,
        seed=config.seed,
        callbacks=callbacks or Callbacks(),
        processes=processes,
    )
    comparison = make(config, run, is_made)
    if comparison is not None:
        save_comparison(comparison, config.out)
    return paths[0]


def list_artifacts(config: TransferConfig) -> list[Path]:
    """Return where a run's files are or will be: one, or one an expert."""
    if config.experts.low_noise_model is None:
        return [config.out / ARTIFACT_NAME]
    return [config.out / name for name in EXPERT_NAMES.values()]


def _run_one(
    config: TransferConfig,
    run: Run,
    is_made: bool,
) -> Comparison | None:
    """Make the file unless it is made; return the comparison with its teacher, if still to do."""
    device, precision, processes = run.device, run.precision, run.processes
    path = config.out / ARTIFACT_NAME
    found = open_teacher(config.teacher)
    footprint = check_transfer(found, config, device, precision, processes.size)
    with processes.in_turn():
        teacher = found.load(run).to(device)
    if not is_made:
        # Several processes share a training that none of them could hold alone.
        _forecast(
            teacher, config, precision, footprint, processes, tries_training=processes.size == 1
        )
        with Student(teacher, config.student, seed=config.seed) as student:
            check_layers(config.selection, list(student.mixed))
            with processes.in_turn():
                open_run(config.out, config, ignore=FREE_FIELDS)
            linearize(student, teacher, config, run)
    if not processes.destroy():
        return None
    made = artifact.load(path)
    draw_training(config.out, made.header.linear_layers, config.selection, config.training.steps)
    if is_evaluated(config.evaluation, config.out):
        return None
    logger.info("comparing %s with its teacher on %s in %s", path, device, precision)
    # What ships is what is measured: the saved file, in a model that is not compiled.
    return compare_artifact(
        teacher,
        made,
        compare_config(config.evaluation, config.trajectories),
        seed=config.seed,
        precision=precision,
        callbacks=run.callbacks,
    )


def _run_experts(
    config: TransferConfig,
    run: Run,
    is_made: bool,
) -> Comparison | None:
    """Do the same for Wan 2.2's two experts, whose students are compared at work together."""
    device, precision, processes = run.device, run.precision, run.processes
    checkpoints = check_experts(config, device, precision)
    with processes.in_turn():
        teacher = load_experts(checkpoints, config, run)
    if not is_made:
        footprint = check_transfer(checkpoints[HIGH], config, device, precision)
        _forecast(
            teacher, config, precision, footprint, processes, tries_training=False, num_students=2
        )
        with processes.in_turn():
            open_run(config.out, config, ignore=FREE_FIELDS)
        names = {side: found.checkpoint.path.stem for side, found in checkpoints.items()}
        linearize_experts(teacher, names, config, run)
    if not processes.destroy() or is_evaluated(config.evaluation, config.out):
        return None
    logger.info("comparing both experts with their students on %s in %s", device, precision)
    return compare_experts(
        teacher,
        {side: artifact.load(config.out / name) for side, name in EXPERT_NAMES.items()},
        compare_config(config.evaluation, config.trajectories),
        seed=config.seed,
        precision=precision,
        callbacks=run.callbacks,
    )


def _forecast(
    teacher: Teacher,
    config: TransferConfig,
    precision: str,
    footprint: Footprint,
    processes: ProcessGroup,
    *,
    tries_training: bool,
    num_students: int = 1,
) -> None:
    """Log what a run that has not trained yet takes.

    Raises ValueError, in one sentence, where a disk has too little room.
    """
    if any(config.out.glob("**/training")):
        return
    forecast(
        teacher,
        config,
        precision,
        tries_training=tries_training and not teacher.is_demo,
        num_processes=processes.size,
        num_students=num_students,
        **dataclasses.asdict(footprint),
    )


def summarize(config: TransferConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    lines = []
    for path in list_artifacts(config):
        header = artifact.load(path).header
        layers = ", ".join(map(str, header.linear_layers))
        whose = header.provenance.get("expert", "")
        lines.append(
            f"{len(header.linear_layers)} of {header.num_layers} layers "
            f"{f'of the {whose} expert ' if whose else ''}are linear: {layers}"
        )
    lines.append("")
    if table := show_evaluation(config.out, config.evaluation, _SHOWN):
        lines += [table, "swapped: the same layers linear, without any training", ""]
    return "\n".join([*lines, *list_files(config.out, _FILES)]) + "\n"


def show_evaluation(folder: Path, config: EvaluationConfig, columns: Sequence[str]) -> str:
    """Return the table of a run folder's comparison; "" where none was asked for or made."""
    found = read_evaluation(folder) if config.evaluate_samples else None
    if found is None:
        return ""
    return show_table([{key: row[key] for key in columns if key in row} for row in found["rows"]])


def list_files(folder: Path, meanings: Mapping[str, str]) -> list[str]:
    """Return lines that say which files a run folder holds; meanings: by the files' names."""
    held = {name: meaning for name, meaning in meanings.items() if (folder / name).exists()}
    width = max([24, *(2 + len(name) for name in held)])
    return [f"{folder} holds", *(f"  {name:<{width}}{meaning}" for name, meaning in held.items())]


def main(config: TransferConfig) -> None:
    """Run the transfer with progress bars, on however many processes there are."""
    run_with_bars(config, run, summarize)


def run_with_bars(
    config: ConfigT,
    run: Callable[[ConfigT, Callbacks, ProcessGroup], object],
    summarize: Callable[[ConfigT], str],
) -> None:
    """Run a training's command on all processes; the first one shows bars and the summary."""

    def work(processes: ProcessGroup) -> None:
        with TerminalCallbacks(is_shown=processes.is_first) as callbacks, explained(LOWER_RUN):
            run(config, callbacks, processes)
        if processes.is_first:
            sys.stdout.write(f"\n{summarize(config)}")

    run_together(work)
