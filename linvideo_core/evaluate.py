"""Compare a linearized model with its teacher: `python -m linvideo_core.evaluate`.

Three models sample the same prompts from the same noise: the teacher, the teacher with the chosen
layers merely swapped for untrained linear attention, and the student.
    python -m linvideo_core.evaluate                                  # minutes on a laptop
    python -m linvideo_core.evaluate --preset full --record           # a GPU; README's table
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors
The folder `--out` then holds evaluation.json, samples.png, samples.gif and velocity_error.png.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import artifact as artifact_files
from .adapters import shapes_of
from .comparison import CompareConfig, compare_artifact, save_comparison
from .config import option, parse, run_command, to_flags, to_json
from .demo import weights_path
from .devices import device_option, precision_option, resolve_device, resolve_precision
from .progress import Progress, TqdmProgress, silent
from .records import RESULTS_FOLDER, write_record
from .storage import write_text
from .subject import SubjectConfig, load_subject
from .tables import show_table

logger = logging.getLogger(__name__)

RECORD_PATH = RESULTS_FOLDER / "transfer_demo.json"
RECORD_KEYS = ("model", "linear_layers", "layers", "digit", "motion", "frechet", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which student is compared, and where the evidence goes."""

    subject: SubjectConfig = dataclasses.field(default_factory=SubjectConfig)
    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    artifact: Path | None = option(None, "LINVIDEO file; none: the embedded model's own")
    out: Path = option(Path("runs/evaluate"), "folder for tables and pictures")
    record: bool = option(False, "write results/transfer_demo.json, which README shows")
    seed: int = option(0, "seed of noise and prompts")
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        if self.subject.model is not None and self.artifact is None:
            raise ValueError("--model was given without --artifact; give the file made for it")
        if self.record and (self.subject != SubjectConfig() or self.artifact is not None):
            raise ValueError(
                "--record was given with --model, --prompts or --artifact; the record is of "
                "the embedded model and its own file alone"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "full": {"num_samples": 1000, "batch_size": 250, "out": Path("runs/evaluate-full")},
}


def run(config: EvaluateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Compare teacher, swapped and student; write tables and pictures into `config.out`.

    Returns what evaluation.json holds: `settings`, `rows`, `velocity_rows` (see `Comparison`).
    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    path = config.artifact or weights_path("linearized.safetensors")
    artifact = artifact_files.load(path)
    subject = load_subject(config.subject, config.out, device, progress).to(device)
    artifact_files.check(artifact, shapes_of(subject.model))
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "config.json", to_json(config))
    logger.info("comparing %s with its student on %s in %s", subject.name, device, precision)
    comparison = compare_artifact(
        subject,
        artifact,
        config.comparison,
        seed=config.seed,
        precision=precision,
        progress=progress,
    )
    result = save_comparison(comparison, config.out)
    if config.record:
        count = f"{len(artifact.header.layers)} of {artifact.header.num_layers}"
        write_record(
            RECORD_PATH,
            title=f"Embedded model, {count} layers linear, {config.comparison.num_samples} samples",
            command=describe_command(config),
            rows=[{key: row.get(key) for key in RECORD_KEYS} for row in comparison.rows],
            device=device,
        )
    return result


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
    with TqdmProgress() as progress:
        result = run(config, progress)
    sys.stdout.write(f"\n{show_table(result['rows'])}\npictures and tables: {config.out}\n")


if __name__ == "__main__":
    run_command(main)
