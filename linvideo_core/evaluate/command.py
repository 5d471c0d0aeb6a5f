"""One run of the command: load the files, sample every model, measure, save and show."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..demo import weights_path
from ..flow import make_sigmas
from ..models.config import SoftmaxConfig
from ..run.callbacks import Callbacks
from ..run.config import to_json
from ..run.context import Run
from ..run.devices import resolve_device, resolve_precision
from ..run.errors import SettingError
from ..run.files import write_text
from ..run.folder import check_place, check_run, open_run
from ..run.lock import locked
from ..run.memory import explained
from ..run.progress import TerminalCallbacks
from ..run.tables import show_table
from ..teacher.teacher import Teacher, TeacherCheckpoint, open_teacher
from .autoencoder import check_packages, find_autoencoder, with_decoder
from .card import upload_commands, write_card
from .compare import (
    FewStepLora,
    compare_artifact,
    compare_few_step,
    compare_kernels,
    load_distilled,
    load_linearized,
    save_comparison,
)
from .config import EvaluateConfig
from .export import check_names, export_videos
from .lora_file import load_lora

logger = logging.getLogger(__name__)

_LORA_STEPS = 4
_LOWER = "lower {batch_size} or the video's size, or give {frozen} bf16 or {offload_blocks}"

# What a repeated export may change: none of it decides a video.
_FREE_FIELDS = ("export_videos", "out", "device", "num_samples", "seeds_per_prompt", "plain_steps")
_FREE_FIELDS += ("batch_size", "offload_blocks")

KERNEL_KEYS = (
    "model",
    "linear_layers",
    "hybrid_layers",
    "distance_to_teacher",
    "pixel_error",
    "temporal_spectrum_db",
    "motion_energy",
    "digit",
    "motion",
    "seconds_per_video",
    "speedup",
)
FEW_STEP_KEYS = (
    "model",
    "steps",
    "digit",
    "motion",
    "motion_energy",
    "frechet",
    "diversity",
    "seconds_per_video",
    "speedup",
)


def run(config: EvaluateConfig, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Compare teacher, swapped and student, or steps against quality.

    Or kernels of softmax layers. Tables, pictures and, but for kernels, the files' model card go
    into `config.out`.

    Returns what evaluation.json holds: `settings`, `rows`, `velocity_rows` (see `Comparison`).
    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    check_place(config.out)
    lora = None
    if config.lora is not None:
        levels = config.levels_of_lora()
        sigmas = make_sigmas(_LORA_STEPS, config.comparison.shift)
        lora = FewStepLora(
            file=load_lora(config.lora),
            strength=config.lora_strength,
            sigmas=torch.tensor(levels) if levels else sigmas,
        )
    teacher, first, distilled, how = _open(config, config.out, callbacks or Callbacks())
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "config.json", to_json(config))
    if kernels := config.list_kernels():
        how["dense_share"] = config.dense_share
        comparison = compare_kernels(teacher, first, kernels, config.comparison, **how)
        return save_comparison(comparison, config.out)
    if distilled or lora:
        how |= {"plain_steps": config.numbers_of_plain_steps(), "lora": lora}
        comparison = compare_few_step(teacher, first, distilled, config.comparison, **how)
    else:
        comparison = compare_artifact(teacher, first, config.comparison, **how)
    result = save_comparison(comparison, config.out)
    made = list(distilled.values()) or [first]
    write_card(config.out, dict(zip(_paths(config), made, strict=True)), result)
    return result


def _paths(config: EvaluateConfig) -> list[Path]:
    """Return the files that are shown: the distilled ones, or the linearized one."""
    return config.distilled_paths() or [config.artifact or weights_path("linearized.safetensors")]


def export(config: EvaluateConfig, callbacks: Callbacks | None = None) -> None:
    """Write videos for VBench into `config.export_videos`, instead of a comparison.

    Of the distilled files, where some are given, else of the linearized one; and of the teacher.
    Repeating the command continues. Raises as `run`.
    """
    folder = config.export_videos
    check_packages("export_videos")
    try:
        check_run(folder, config, ignore=_FREE_FIELDS)
    except SettingError as error:
        message = error.message.replace("{out}", "{export_videos}")
        raise SettingError(message, *error.fields, "export_videos") from error
    teacher, first, distilled, how = _open(config, folder, callbacks or Callbacks())
    check_names(teacher.prompts)
    open_run(folder, config, ignore=_FREE_FIELDS)
    export_videos(teacher, distilled or {"student": first}, config.comparison, folder, **how)


def _open(
    config: EvaluateConfig, folder: Path, callbacks: Callbacks
) -> tuple[Teacher, Artifact | None, dict[str, Artifact], dict[str, Any]]:
    """Return the teacher on its device, the files, and how models are sampled.

    The first file is the linearized one, None where kernels are compared on a model without one.

    folder: where prompts are encoded into.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    has_none = config.teacher.model is not None and config.artifact is None
    first = None if has_none else load_linearized(config.artifact)
    distilled = load_distilled(config.distilled_paths(), first)
    found = open_teacher(config.teacher)
    with torch.no_grad():
        found.check_softmax(device, precision)
        _check_kernels(found, config.list_kernels(), device, precision)
    for artifact in filter(None, (first, *distilled.values())):
        artifact_files.check(artifact, found.shapes)
    autoencoder = find_autoencoder(config.vae, config.teacher.model)
    run = Run(folder=folder, device=device, callbacks=callbacks)
    teacher = with_decoder(found.load(run).to(device), autoencoder)
    logger.info("sampling %s and its students on %s in %s", teacher.name, device, precision)
    how = {"seed": config.seed, "precision": precision, "callbacks": callbacks}
    if config.teacher.softmax.is_sparse:
        how["softmax"] = config.teacher.softmax
    return teacher, first, distilled, how


def _check_kernels(
    found: TeacherCheckpoint, kernels: Sequence[SoftmaxConfig], device: str, precision: str
) -> None:
    """Raise SettingError for a kernel that cannot compute the model's softmax layers."""
    for softmax in kernels:
        try:
            dataclasses.replace(found, softmax=softmax).check_softmax(device, precision)
        except SettingError as error:
            message = error.message.replace("{softmax_kernel}", "{kernels}")
            raise SettingError(message, "kernels", "precision") from error


def main(config: EvaluateConfig) -> None:
    """Compare with progress bars and show the table, or write videos for VBench."""
    with TerminalCallbacks() as callbacks, explained(_LOWER):
        if config.export_videos is not None:
            export(config, callbacks)
            sys.stdout.write(f"videos: {config.export_videos}\n")
            return
        check_place(config.out)
        with locked(config.out):
            rows = run(config, callbacks)["rows"]
    if config.kernels:
        rows = [{key: row[key] for key in KERNEL_KEYS if key in row} for row in rows]
        sys.stdout.write(f"\n{show_table(rows)}\npictures and tables: {config.out}\n")
        return
    if config.distilled_paths() or config.lora:
        rows = [{key: row[key] for key in FEW_STEP_KEYS if key in row} for row in rows]
    published = upload_commands(config.out, _paths(config))
    sys.stdout.write(f"\n{show_table(rows)}\npictures, tables and model card: {config.out}\n")
    if config.artifact is not None:
        sys.stdout.write(f"to publish, fill in the card, then\n{published}")
