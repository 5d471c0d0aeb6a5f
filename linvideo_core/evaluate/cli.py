"""Compare a linearized model with its teacher: `python -m linvideo_core.evaluate`.

Three models sample the same prompts from the same noise: the teacher, the teacher with the chosen
layers merely swapped for untrained linear attention, and the student.
    python -m linvideo_core.evaluate                                  # minutes on a laptop
    python -m linvideo_core.evaluate --preset full --record           # a GPU; README's table
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors
With `--distilled` it compares steps against quality: the teacher and the linearized model by Euler
at all steps and at few, the distilled ones at their own.
    python -m linvideo_core.evaluate --distilled runs/distill/distilled.safetensors
    python -m linvideo_core.evaluate --preset full --record \
        --distilled distilled.safetensors,single_stage.safetensors
A few-step LoRA of others is compared the same way, on the teacher and on the linearized model.
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors --lora few_step_lora.safetensors --shift 5
The folder `--out` then holds evaluation.json, samples.png, samples.gif and velocity_error.png, with
`--distilled` also steps.png.
"""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artifact as artifact_files
from ..flow import make_sigmas
from ..models.attention_sites import shapes_of
from ..run.config import option, parse, to_flags, to_json
from ..run.devices import device_option, precision_option, resolve_device, resolve_precision
from ..run.files import write_text
from ..run.memory import explained
from ..run.progress import Progress, TqdmProgress, silent
from ..run.records import RESULTS_FOLDER, write_record
from ..run.tables import show_table
from ..teacher.teacher import TeacherConfig, load_teacher
from .compare import Comparison, compare_artifact, compare_few_step, save_comparison
from .entrants import FewStepLora, find_entrants, load_distilled, load_linearized
from .lora_file import load_lora
from .plots import plot_steps
from .sampler import CompareConfig

logger = logging.getLogger(__name__)

_LORA_STEPS = 4
_LOWER = "lower --batch-size or the video's size, or give --frozen bf16 or --offload-blocks"

RECORD_PATH = RESULTS_FOLDER / "transfer_demo.json"
RECORD_KEYS = ("model", "linear_layers", "layers", "digit", "motion", "frechet", "seconds")
FEW_STEP_RECORD_PATH = RESULTS_FOLDER / "few_step.json"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which student is compared, and where the evidence goes."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    artifact: Path | None = option(None, "LINVIDEO file; none: the embedded model's own")
    distilled: str = option(
        "", "files that were distilled from it, such as a.safetensors,b.safetensors; none: no few"
    )
    lora: Path | None = option(
        None, "few-step LoRA of others, to be added to the linearized model and to its teacher"
    )
    lora_strength: float = option(1.0, "share of the LoRA's change that is added")
    lora_sigmas: str = option(
        "", "noise levels to sample at with the LoRA, such as 1,0.9,0.7,0; none: 4 steps at --shift"
    )
    plain_steps: str = option(
        "25,8,4", "with --distilled or --lora: Euler steps that teacher and linearized model take"
    )
    out: Path = option(Path("runs/evaluate"), "folder for tables and pictures")
    record: bool = option(
        False, "write results/transfer_demo.json, with --distilled results/few_step.json"
    )
    seed: int = option(0, "seed of noise and prompts")
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        if self.teacher.model is not None and self.artifact is None:
            raise ValueError("--model was given without --artifact; give the file made for it")
        is_own = self.teacher == TeacherConfig() and self.artifact is None and self.lora is None
        if self.record and not is_own:
            raise ValueError(
                "--record was given with --model, --prompts, --artifact or --lora; the record is "
                "of the embedded model and its own files alone"
            )
        self.numbers_of_plain_steps()
        self.levels_of_lora()

    def distilled_paths(self) -> list[Path]:
        """Return the distilled files, none by default."""
        return [Path(name.strip()) for name in self.distilled.split(",") if name.strip()]

    def numbers_of_plain_steps(self) -> list[int]:
        """Return the numbers of Euler steps that are compared with all steps.

        Raises ValueError for anything but a list of numbers.
        """
        words = [word.strip() for word in self.plain_steps.split(",") if word.strip()]
        if not all(word.isascii() and word.isdigit() for word in words):
            raise ValueError(
                f"--plain-steps {self.plain_steps} given; numbers such as 25,8,4 are needed"
            )
        return sorted({int(word) for word in words} - {0, self.comparison.steps}, reverse=True)

    def levels_of_lora(self) -> Tensor:
        """Return the noise levels [steps + 1] to sample at with the LoRA.

        Raises ValueError for anything but numbers that fall from at most 1 to 0.
        """
        if not self.lora_sigmas:
            return make_sigmas(_LORA_STEPS, self.comparison.shift)
        try:
            levels = [float(word) for word in self.lora_sigmas.split(",")]
        except ValueError:
            levels = []
        falls = all(high > low for high, low in itertools.pairwise(levels))
        if len(levels) < 2 or not falls or levels[0] > 1 or levels[-1] != 0:
            raise ValueError(
                f"--lora-sigmas {self.lora_sigmas} given; numbers that fall from at most 1 to 0, "
                "such as 1,0.9,0.7,0, are needed"
            )
        return torch.tensor(levels)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "full": {"num_samples": 1000, "batch_size": 250, "out": Path("runs/evaluate-full")},
}


def run(config: EvaluateConfig, progress: Progress = silent) -> dict[str, Any]:
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
        file, sigmas = load_lora(config.lora), config.levels_of_lora()
        lora = FewStepLora(file=file, strength=config.lora_strength, sigmas=sigmas)
    teacher = load_teacher(config.teacher, config.out, device, progress).to(device)
    for artifact in (first, *distilled.values()):
        artifact_files.check(artifact, shapes_of(teacher.model))
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "config.json", to_json(config))
    logger.info("comparing %s with its students on %s in %s", teacher.name, device, precision)
    how = {"seed": config.seed, "precision": precision, "progress": progress}
    if distilled or lora:
        steps = config.numbers_of_plain_steps()
        entrants = find_entrants(
            teacher.model, first, distilled, config.comparison, plain_steps=steps, lora=lora
        )
        comparison = compare_few_step(teacher, entrants, config.comparison, **how)
    else:
        comparison = compare_artifact(teacher, first, config.comparison, **how)
    result = save_comparison(comparison, config.out)
    if config.record and distilled:
        record_few_step(FEW_STEP_RECORD_PATH, comparison, list(distilled), config, device)
    elif config.record:
        count = f"{len(first.header.layers)} of {first.header.num_layers}"
        write_record(
            RECORD_PATH,
            title=f"Embedded model, {count} layers linear, {config.comparison.num_samples} samples",
            command=describe_command(config),
            rows=[{key: row.get(key) for key in RECORD_KEYS} for row in comparison.rows],
            device=device,
        )
    return result


def record_few_step(
    path: Path,
    comparison: Comparison,
    distilled: Sequence[str],
    config: EvaluateConfig,
    device: torch.device,
) -> None:
    """Write the record of few steps and, beside it, its picture.

    distilled: the names of the distilled models, the first of which the title speaks of.
    All other steps are in the record's details.
    """
    measured = [{key: row.get(key) for key in FEW_STEP_KEYS} for row in comparison.rows]
    by_name = {row["model"]: row for row in measured}
    teacher, best = by_name["teacher"], by_name[distilled[0]]
    own_steps = sorted({by_name[name]["steps"] for name in distilled}, reverse=True)
    plain = [f"linearized_{steps}_plain" for steps in own_steps]
    names = ["teacher", "linearized", *plain, *distilled]
    saving = teacher["seconds_per_video"] / best["seconds_per_video"]
    write_record(
        path,
        title=(
            f"Embedded model, {config.comparison.num_samples} samples: {best['steps']} steps take "
            f"1/{saving:.1f} of the time of {teacher['steps']} guided ones"
        ),
        command=describe_command(config),
        rows=[by_name[name] for name in names],
        device=device,
        details={"all_steps": measured},
    )
    plot_steps(comparison.rows, path.with_suffix(".png"))


def describe_command(config: EvaluateConfig) -> str:
    """Return the command that measures a record again: every flag that decides its numbers."""
    return f"python -m linvideo_core.evaluate {to_flags(config, without=('out', 'device'))}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare with progress bars, show the table."""
    config, is_dry_run = parse(
        EvaluateConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
    )
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    with TqdmProgress() as progress, explained(_LOWER):
        result = run(config, progress)
    rows = result["rows"]
    if config.distilled_paths() or config.lora:
        rows = [{key: row[key] for key in FEW_STEP_KEYS if key in row} for row in rows]
    sys.stdout.write(f"\n{show_table(rows)}\npictures and tables: {config.out}\n")


command = main
