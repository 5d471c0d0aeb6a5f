"""Measure the files that ship with the embedded model: `python -m research.evaluation_record`.

It runs `linvideo_core.evaluate` with the flags given, and writes results/transfer_demo.json or,
with --distilled, results/few_step.json and .png.
    python -m research.evaluation_record --preset full
    python -m research.evaluation_record --preset full \
        --distilled distilled.safetensors,single_stage.safetensors
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS_FOLDER, show_rows, write_record
from linvideo_core.evaluate import cli as evaluate
from linvideo_core.run.config import parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device

KEYS = ("model", "linear_layers", "layers", "digit", "motion", "frechet", "seconds")

Row = dict[str, Any]


def record_transfer(config: evaluate.EvaluateConfig, rows: Sequence[Row], path: Path) -> Row:
    """Write the record of teacher, swapped and student; return it."""
    student = next(row for row in rows if row["model"] == "student")
    count = f"{student['linear_layers']} of {student['layers']}"
    return write_record(
        path,
        title=f"Embedded model, {count} layers linear, {config.comparison.num_samples} samples",
        command=_command(config),
        rows=[{key: row.get(key) for key in KEYS} for row in rows],
        device=resolve_device(config.device),
    )


def record_few_step(config: evaluate.EvaluateConfig, rows: Sequence[Row], path: Path) -> Row:
    """Write the record of few steps and, beside it, its picture; return the record.

    Rows: the teacher, the linearized model at all steps and at the distilled models' steps, the
    distilled models; all others are in the details.
    """
    measured = [{key: row.get(key) for key in evaluate.FEW_STEP_KEYS} for row in rows]
    distilled = [row for row in measured if row["model"].startswith(("distilled", "single_stage"))]
    plain = {f"linearized_{row['steps']}_plain" for row in distilled}
    shown = [row for row in measured if row["model"] in {"teacher", "linearized", *plain}]
    teacher, best = measured[0], distilled[0]
    saving = teacher["seconds_per_video"] / best["seconds_per_video"]
    record = write_record(
        path,
        title=(
            f"Embedded model, {config.comparison.num_samples} samples: {best['steps']} steps take "
            f"1/{saving:.1f} of the time of {teacher['steps']} guided ones"
        ),
        command=_command(config),
        rows=[*shown, *distilled],
        device=resolve_device(config.device),
        details={"all_steps": measured},
    )
    shutil.copyfile(config.out / "steps.png", path.with_suffix(".png"))
    return record


def _command(config: evaluate.EvaluateConfig) -> str:
    return f"python -m research.evaluation_record {to_flags(config, without=('out', 'device'))}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write the record."""
    config = parse(
        evaluate.EvaluateConfig,
        argv,
        description=__doc__,
        presets=evaluate.PRESETS,
    )
    if config.teacher.model is not None or config.artifact is not None or config.lora is not None:
        raise ValueError(
            "--model, --artifact or --lora was given; the record is of the embedded model and its "
            "own files alone"
        )
    rows = evaluate.run(config)["rows"]
    if config.distilled:
        record = record_few_step(config, rows, RESULTS_FOLDER / "few_step.json")
    else:
        record = record_transfer(config, rows, RESULTS_FOLDER / "transfer_demo.json")
    sys.stdout.write(show_rows(record["rows"]))


if __name__ == "__main__":
    run_command(main)
