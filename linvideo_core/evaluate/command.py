"""One run of the command: load the files, sample every model, measure, save and show."""

import logging
import sys
from typing import Any

import torch

from .. import artifact as artifact_files
from ..flow import make_sigmas
from ..models.attention_sites import shapes_of
from ..run.callbacks import Callbacks
from ..run.config import to_json
from ..run.context import Run
from ..run.devices import resolve_device, resolve_precision
from ..run.files import write_text
from ..run.memory import explained
from ..run.progress import TerminalCallbacks
from ..run.tables import show_table
from ..teacher.teacher import load_teacher
from .compare import (
    FewStepLora,
    compare_artifact,
    compare_few_step,
    load_distilled,
    load_linearized,
    save_comparison,
)
from .config import EvaluateConfig
from .lora_file import load_lora

logger = logging.getLogger(__name__)

_LORA_STEPS = 4
_LOWER = "lower {batch_size} or the video's size, or give {frozen} bf16 or {offload_blocks}"

FEW_STEP_KEYS = (
    "model",
    "steps",
    "digit",
    "motion",
    "motion_energy",
    "frechet",
    "diversity",
    "seconds_per_video",
)


def run(config: EvaluateConfig, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Compare teacher, swapped and student, or steps against quality.

    Tables and pictures go into `config.out`.

    Returns what evaluation.json holds: `settings`, `rows`, `velocity_rows` (see `Comparison`).
    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    first = load_linearized(config.artifact)
    distilled = load_distilled(config.distilled_paths(), first)
    lora = None
    if config.lora is not None:
        levels = config.levels_of_lora()
        sigmas = make_sigmas(_LORA_STEPS, config.comparison.shift)
        lora = FewStepLora(
            file=load_lora(config.lora),
            strength=config.lora_strength,
            sigmas=torch.tensor(levels) if levels else sigmas,
        )
    teacher = load_teacher(
        config.teacher,
        Run(folder=config.out, device=device, callbacks=callbacks or Callbacks()),
    ).to(device)
    for artifact in (first, *distilled.values()):
        artifact_files.check(artifact, shapes_of(teacher.model))
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "config.json", to_json(config))
    logger.info("comparing %s with its students on %s in %s", teacher.name, device, precision)
    how = {"seed": config.seed, "precision": precision, "callbacks": callbacks}
    if distilled or lora:
        how |= {"plain_steps": config.numbers_of_plain_steps(), "lora": lora}
        comparison = compare_few_step(teacher, first, distilled, config.comparison, **how)
    else:
        comparison = compare_artifact(teacher, first, config.comparison, **how)
    return save_comparison(comparison, config.out)


def main(config: EvaluateConfig) -> None:
    """Compare with progress bars and show the table."""
    with TerminalCallbacks() as callbacks, explained(_LOWER):
        rows = run(config, callbacks)["rows"]
    if config.distilled_paths() or config.lora:
        rows = [{key: row[key] for key in FEW_STEP_KEYS if key in row} for row in rows]
    sys.stdout.write(f"\n{show_table(rows)}\npictures and tables: {config.out}\n")
