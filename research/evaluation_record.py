"""Keep what `linvideo_core.evaluate` measures: `python -m research.evaluation_record`.

It runs that command with the flags given. Of the embedded model and its own files it writes
results/transfer_demo.json or, with --distilled, results/few_step.json and .png; of any model, with
--kernels, results/softmax_distance.json.
    python -m research.evaluation_record --preset full
    python -m research.evaluation_record --preset full \
        --distilled distilled.safetensors,single_stage.safetensors
"""

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.record import RESULTS_FOLDER, show_rows, write_record
from linvideo_core.evaluate.cli import PRESETS
from linvideo_core.evaluate.command import FEW_STEP_KEYS, KERNEL_KEYS, run
from linvideo_core.evaluate.config import EvaluateConfig
from linvideo_core.run.config import parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device

KEYS = ("model", "linear_layers", "layers", "digit", "motion", "frechet", "seconds")
_DISTANCES = ("softmax_backend", "density", "linear_layers", "layers", *KERNEL_KEYS[2:])

Row = dict[str, Any]


def describe_transfer(config: EvaluateConfig, rows: Sequence[Row]) -> Row:
    """Return title and rows of the record of teacher, swapped and student."""
    student = next(row for row in rows if row["model"] == "student")
    count = f"{student['linear_layers']} of {student['layers']}"
    return {
        "title": f"Embedded model, {count} layers linear, {config.comparison.num_samples} samples",
        "rows": [{key: row.get(key) for key in KEYS} for row in rows],
    }


def describe_kernels(config: EvaluateConfig, rows: Sequence[Row]) -> Row:
    """Return title and rows of the record of kernels of softmax layers."""
    model = config.teacher.model.stem if config.teacher.model else "embedded model"
    count, steps = config.comparison.num_samples, config.comparison.sampler_steps
    return {
        "title": f"Distance to the dense videos from the same noise: {model}, {count} videos of "
        f"{steps} steps",
        "rows": [{key: row[key] for key in _DISTANCES if key in row} for row in rows],
    }


def describe_few_step(config: EvaluateConfig, rows: Sequence[Row]) -> Row:
    """Return title, rows and details of the record of few steps.

    Rows: the teacher, the linearized model at all steps and at the distilled models' steps, the
    distilled models; all others are in the details.
    """
    measured = [{key: row.get(key) for key in FEW_STEP_KEYS} for row in rows]
    distilled = [row for row in measured if row["model"].startswith(("distilled", "single_stage"))]
    plain = {f"linearized_{row['steps']}_plain" for row in distilled}
    shown = [row for row in measured if row["model"] in {"teacher", "linearized", *plain}]
    teacher, best = measured[0], distilled[0]
    saving = teacher["seconds_per_video"] / best["seconds_per_video"]
    return {
        "title": (
            f"Embedded model, {config.comparison.num_samples} samples: {best['steps']} steps take "
            f"1/{saving:.1f} of the time of {teacher['steps']} guided ones"
        ),
        "rows": [*shown, *distilled],
        "details": {"all_steps": measured},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write the record, and beside that of few steps its picture.

    Raises ValueError for another model or file than the shipped ones, but with --kernels.
    """
    config = parse(EvaluateConfig, argv, description=__doc__, presets=PRESETS)
    is_own = config.teacher.model is not None or config.artifact is not None
    if config.lora is not None or (is_own and not config.kernels):
        raise ValueError(
            "--model, --artifact or --lora was given; the record is of the embedded model and its "
            "own files alone, but with --kernels"
        )
    rows = run(config)["rows"]
    describe, name = describe_transfer, "transfer_demo"
    if config.kernels:
        describe, name = describe_kernels, "softmax_distance"
    elif config.distilled:
        describe, name = describe_few_step, "few_step"
    flags = to_flags(config, without=("out", "device"))
    record = write_record(
        RESULTS_FOLDER / f"{name}.json",
        **describe(config, rows),
        command=f"python -m research.evaluation_record {flags}",
        device=resolve_device(config.device),
    )
    if config.distilled:
        shutil.copyfile(config.out / "steps.png", RESULTS_FOLDER / "few_step.png")
    sys.stdout.write(show_rows(record["rows"]))


if __name__ == "__main__":
    run_command(main)
