"""One run of the command: check, train, compare, and say what was made."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .. import artifact
from ..artifact.header import ArtifactHeader
from ..evaluate import plots
from ..evaluate.autoencoder import find_autoencoder, with_decoder
from ..evaluate.card import CARD_NAME, SAMPLES_NAMES, write_card
from ..evaluate.compare import (
    EVALUATION_NAME,
    compare_artifact,
    compare_experts,
    read_evaluation,
    save_comparison,
)
from ..evaluate.config import CompareConfig
from ..models.experts import HIGH, LOW
from ..run.callbacks import Callbacks
from ..run.context import Run
from ..run.devices import resolve_device, resolve_precision
from ..run.files import find_below
from ..run.folder import CONFIG_NAME, check_place, check_run, open_run, read_metrics
from ..run.lock import locked
from ..run.memory import LOWER_RUN, explained
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import TerminalCallbacks
from ..run.tables import show_table
from ..teacher.config import TrajectoryConfig
from ..teacher.teacher import Teacher, open_teacher
from ..teacher.trajectories import USED_AGAIN, has_stored_since
from ..training.checkpoint import finished_steps
from ..training.fsdp import run_together
from .config import (
    ARTIFACT_NAME,
    TRAINING_NAME,
    WARM_START_NAME,
    EvaluationConfig,
    RunConfig,
    SelectionConfig,
    TransferConfig,
)
from .estimate import Pace, announce, forecast, time_run
from .experts import EXPERT_NAMES, check_experts, linearize_experts, load_experts
from .layer_costs import COSTS_NAME, LayerCosts, find_costs, keep_costs, origin_of, with_count
from .layer_selection import RANKING_NAME, count_selection_steps
from .pipeline import linearize
from .preflight import Footprint, check_transfer
from .student import Student

logger = logging.getLogger(__name__)

RunConfigT = TypeVar("RunConfigT", bound=RunConfig)

# What a repeated command may change: none of it decides the artifact.
FREE_FIELDS = (
    "card",
    "estimate",
    "out",
    "teacher_folder",
    "shard_size",
    "offload_blocks",
    "evaluate_samples",
    "evaluate_batch_size",
    "vae",
)
_SHOWN = (
    "model",
    "linear_layers",
    "hybrid_layers",
    "layers",
    "digit",
    "motion",
    "frechet",
    "motion_energy",
    "velocity_error",
    "seconds_per_video",
    "speedup",
)
_FILES = {
    ARTIFACT_NAME: "the LINVIDEO file: what ComfyUI's nodes load",
    EXPERT_NAMES[HIGH]: "the LINVIDEO file of the high-noise expert",
    EXPERT_NAMES[LOW]: "the LINVIDEO file of the low-noise expert",
    **dict.fromkeys(SAMPLES_NAMES, "the same videos by the teacher, before and after training"),
    "samples.png": "their frames side by side",
    "layer_scores.png": "how training chose the layers",
    COSTS_NAME: "what layers cost, from which their number was counted",
    RANKING_NAME: "how much each layer alone changes the velocity",
    "losses.png": "how training went",
    "velocity_error.png": "how far the model is from its teacher, by noise level",
    EVALUATION_NAME: "every measure",
    CARD_NAME: "the model card, to publish the file with",
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
    run = begin_run(config, paths, callbacks, processes)
    if run is not None:
        with locked(config.out, processes):
            _make_and_compare(config, paths, run)
    return paths[0]


def _make_and_compare(config: TransferConfig, paths: Sequence[Path], run: Run) -> None:
    autoencoder = find_autoencoder(config.evaluation.vae, config.teacher.model)
    make = _make_one if config.experts.low_noise_model is None else _make_experts
    teacher = make(config, run, is_made(config.out, paths))
    if not run.processes.destroy():
        return
    made = [artifact.load(path) for path in paths]
    folders = [config.out] if len(made) == 1 else [config.out / side for side in EXPERT_NAMES]
    for folder, each in zip(folders, made, strict=True):
        draw_training(folder, each.header, config.selection, config.training.steps)
    if not is_evaluated(config.evaluation, config.out):
        # What ships is what is measured: the saved file, in a model that is not compiled.
        logger.info("comparing %s with its teacher on %s in %s", paths[0], run.device,
                    run.precision)  # fmt: skip
        settings = compare_config(config.evaluation, config.trajectories)
        how = {"seed": run.seed, "precision": run.precision, "callbacks": run.callbacks}
        teacher = with_decoder(teacher, autoencoder)
        if len(made) == 1:
            comparison = compare_artifact(teacher, made[0], settings, **how)
        else:
            by_side = dict(zip(EXPERT_NAMES, made, strict=True))
            comparison = compare_experts(teacher, by_side, settings, **how)
        save_comparison(comparison, config.out)
    write_card(config.out, dict(zip(paths, made, strict=True)), read_evaluation(config.out))


def begin_run(
    config: RunConfig,
    paths: Sequence[Path],
    callbacks: Callbacks | None,
    processes: ProcessGroup,
) -> Run | None:
    """Return how a command runs; None where its folder holds all that it would make.

    paths: of the files that it makes.

    Raises ValueError, in one sentence, for a folder of another run or what the machine has not.
    """
    if is_made(config.out, paths):
        open_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
        # The card comes last: without it the run was stopped between its file and its end.
        if is_evaluated(config.evaluation, config.out) and (config.out / CARD_NAME).exists():
            logger.info("%s is finished: nothing was left to do", config.out)
            return None
    processes.check_batch(config.training.batch_size)
    device = processes.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    check_run(config.out, config, ignore=FREE_FIELDS, new_run=USED_AGAIN)
    if config.trajectories.teacher_folder is not None:
        check_place(config.trajectories.teacher_folder, "teacher_folder")
    return Run(
        folder=config.out,
        device=device,
        precision=precision,
        seed=config.seed,
        callbacks=callbacks or Callbacks(),
        processes=processes,
    )


def is_made(folder: Path, paths: Sequence[Path]) -> bool:
    """Say whether a run folder holds its files, and the settings that they were made with."""
    return all(path.exists() for path in [*paths, folder / CONFIG_NAME])


def list_artifacts(config: TransferConfig) -> list[Path]:
    """Return where a run's files are or will be: one, or one an expert."""
    if config.experts.low_noise_model is None:
        return [config.out / ARTIFACT_NAME]
    return [config.out / name for name in EXPERT_NAMES.values()]


def _make_one(config: TransferConfig, run: Run, is_made: bool) -> Teacher:
    """Make the file unless it is made; return the teacher."""
    processes = run.processes
    found = open_teacher(config.teacher, config.pool.sizes)
    footprint = check_transfer(found, config, run.device, run.precision, processes.size)
    with processes.in_turn():
        teacher = found.load(run).to(run.device)
    if not is_made:
        costs = find_costs(teacher, config, run)
        counted = with_count(config, costs)
        # Several processes share a training that none of them could hold alone.
        tries_training = processes.size == 1 and not teacher.is_demo
        _log_forecast(teacher, counted, run, footprint, tries_training=tries_training)
        with Student(teacher, config.student, seed=config.seed) as student:
            _open_folder(config, costs, run)
            linearize(student, teacher, counted, run, origin=origin_of(config))
    return teacher


def _make_experts(config: TransferConfig, run: Run, is_made: bool) -> Teacher:
    """Do the same for Wan 2.2's two experts, whose students are compared at work together."""
    checkpoints, footprint = check_experts(config, run.device, run.precision)
    with run.processes.in_turn():
        teacher = load_experts(checkpoints, config, run)
    if not is_made:
        costs = find_costs(teacher, config, run)
        counted = with_count(config, costs)
        _log_forecast(teacher, counted, run, footprint, tries_training=False, num_students=2)
        _open_folder(config, costs, run)
        names = {side: found.checkpoint.path.stem for side, found in checkpoints.items()}
        linearize_experts(teacher, names, counted, run, origin=origin_of(config))
    return teacher


def _open_folder(config: TransferConfig, costs: LayerCosts | None, run: Run) -> None:
    """Write the settings, and what a target that is a speed-up was counted from."""
    with run.processes.in_turn():
        open_run(config.out, config, ignore=FREE_FIELDS)
        keep_costs(costs, run)


def _log_forecast(
    teacher: Teacher,
    config: TransferConfig,
    run: Run,
    footprint: Footprint,
    *,
    tries_training: bool,
    num_students: int = 1,
) -> None:
    """Log what a run takes that has not trained yet; see `forecast`."""
    if any(find_below(config.out, TRAINING_NAME)):
        return
    how = {"precision": run.precision, "num_processes": run.processes.size}
    pace = time_run(teacher, config, tries_training=tries_training, **how)
    found = forecast(teacher, config, pace, footprint=footprint, num_students=num_students, **how)
    announce(found, run.device)
    run.callbacks.on_estimate(found.seconds)


def estimate_qualities(configs: Mapping[str, TransferConfig]) -> str:
    """Measure a few calls; return a table of what each quality takes on this machine.

    configs: by quality; they differ in what follows from it alone.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    config = next(iter(configs.values()))
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    run = Run(folder=config.out, device=device, precision=precision, seed=config.seed)
    is_one = config.experts.low_noise_model is None
    if is_one:
        found = open_teacher(config.teacher, config.pool.sizes)
        footprints = {
            quality: check_transfer(found, each, device, precision)
            for quality, each in configs.items()
        }
        teacher = found.load(run).to(device)
    else:
        checkpoints, footprint = check_experts(config, device, precision)
        footprints = dict.fromkeys(configs, footprint)
        teacher = load_experts(checkpoints, config, run)
    costs = find_costs(teacher, config, run)
    paces: dict[int, Pace] = {}
    rows = []
    for quality, asked in configs.items():
        each = with_count(asked, costs)
        size = each.training.batch_size
        if size not in paces:
            paces[size] = time_run(teacher, each, precision=precision, tries_training=is_one)
        takes = forecast(
            teacher,
            each,
            paces[size],
            precision=precision,
            footprint=footprints[quality],
            num_students=1 if is_one else 2,
        )
        rows.append({"model": quality, "steps": each.training.steps, **takes.row()})
    return show_table(rows)


def compare_config(config: EvaluationConfig, trajectories: TrajectoryConfig) -> CompareConfig:
    """Return how the comparison samples: as the teacher's trajectories were sampled."""
    return CompareConfig(
        num_samples=config.evaluate_samples,
        sampler_steps=trajectories.sampler_steps,
        guidance_scale=trajectories.guidance_scale,
        shift=trajectories.shift,
        batch_size=config.evaluate_batch_size,
    )


def is_evaluated(config: EvaluationConfig, folder: Path) -> bool:
    """Say whether a run folder holds the comparison that is asked for, if any is."""
    if not config.evaluate_samples:
        return True
    found = read_evaluation(folder)
    return found is not None and found["settings"]["num_samples"] == config.evaluate_samples


def draw_training(
    folder: Path, header: ArtifactHeader, selection: SelectionConfig, num_steps: int
) -> None:
    """Draw losses, and layer scores if learned, from a training's metrics if still there.

    header: of the file that it made; num_steps: of the training.
    """
    metrics_path = folder / TRAINING_NAME / "metrics.jsonl"
    if not metrics_path.exists():
        logger.warning("%s is gone; its pictures are left out", metrics_path)
        return
    rows = read_metrics(metrics_path)
    if selection.rule == "learned":
        plots.plot_layer_scores(
            rows,
            folder / "layer_scores.png",
            layers=header.linear_layers,
            kind=header.form.kind,
            hardened_at=count_selection_steps(selection, num_steps),
        )
    plots.plot_losses(rows, folder / "losses.png")


def summarize(config: TransferConfig) -> str:
    """Say for a reader what a finished run has made: the table, then the files."""
    lines = []
    for path in list_artifacts(config):
        header = artifact.load(path).header
        layers = ", ".join(map(str, header.linear_layers))
        whose = header.provenance.get("expert", "")
        lines.append(
            f"{len(header.linear_layers)} of {header.num_layers} layers "
            f"{f'of the {whose} expert ' if whose else ''}are {header.form.kind}: {layers}"
        )
    note = f"swapped: the same layers {config.student.form.kind}, without any training"
    return "\n".join([*lines, "", show_results(config, _SHOWN, _FILES, note)])


def show_results(
    config: RunConfig, columns: Sequence[str], meanings: Mapping[str, str], note: str = ""
) -> str:
    """Return the table of a run's comparison, if one was asked for, and what its folder holds.

    note: said below the table; meanings: of files, by their names.
    """
    lines = []
    found = read_evaluation(config.out) if config.evaluation.evaluate_samples else None
    if found is not None:
        rows = [{key: row[key] for key in columns if key in row} for row in found["rows"]]
        lines = [show_table(rows), *([note] if note else []), ""]
    held = {name: what for name, what in meanings.items() if (config.out / name).exists()}
    width = max([24, *(2 + len(name) for name in held)])
    lines += [f"{config.out} holds", *(f"  {name:<{width}}{what}" for name, what in held.items())]
    return "\n".join(lines) + "\n"


def describe_kept(config: RunConfig) -> str:
    """Say, in a part of a sentence, what the same command does after an interruption."""
    out, begun = config.out, config.out / CONFIG_NAME
    names = (WARM_START_NAME, TRAINING_NAME)
    places = [place for name in names for place in find_below(out, name)]
    if any(map(finished_steps, places)):
        return "the same command continues from the last checkpoint"
    if begun.exists():
        samples = config.trajectories.folder_beside(out)
        if has_stored_since(samples, begun.stat().st_mtime):
            return f"the same command continues with the teacher's videos in {samples}"
    return "nothing was stored yet, and the same command begins again"


def main(config: TransferConfig) -> None:
    """Run the transfer with progress bars, on however many processes there are."""
    run_with_bars(config, run, summarize)


def main_estimate(configs: Mapping[str, TransferConfig]) -> None:
    """Show what each quality takes; see `estimate_qualities`."""
    with explained(LOWER_RUN):
        table = estimate_qualities(configs)
    sys.stdout.write(f"\n{table}")


def run_with_bars(
    config: RunConfigT,
    run: Callable[[RunConfigT, Callbacks, ProcessGroup], object],
    summarize: Callable[[RunConfigT], str],
) -> None:
    """Run a training's command on all processes; the first one shows bars and the summary."""

    def work(processes: ProcessGroup) -> None:
        with TerminalCallbacks(is_shown=processes.is_first) as callbacks, explained(LOWER_RUN):
            run(config, callbacks, processes)
        if processes.is_first:
            sys.stdout.write(f"\n{summarize(config)}")

    run_together(work, lambda: describe_kept(config))
