"""How far the student is from its teacher, beside how far the teacher is from itself.

    python -m research.floor --num-samples 80 --record
The embedded model's teacher samples the same prompts from two lots of noise, the shipped file's
student from the first. `paired` is the Frechet distance to the teacher's videos of the same noise,
which is fidelity: most of what two lots of videos differ in by chance is in neither. `unpaired` is
that to the teacher's of other noise; the teacher's own, the floor, falls with more videos.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS_FOLDER, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.compare import load_linearized
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.sampler import Evaluator, Samples, draw_noise
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device, resolve_precision
from linvideo_core.run.progress import TerminalCallbacks
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher

_RECORD_NAME = "floor.json"
_OTHER_SEED = 1_000

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloorConfig(Settings):
    """How many videos are compared."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(num_samples=250)
    )
    seed: int = option(0, "seed of noise and prompts")
    device: str = device_option()
    out: Path = option(Path("runs/floor"), "folder of the record")
    record: bool = option(False, f"write results/{_RECORD_NAME}, not the one in --out")


def run(config: FloorConfig) -> list[Row]:
    """Sample the teacher twice and the student once; return a row of each."""
    device = resolve_device(config.device)
    teacher, file = load_teacher(TeacherConfig()).to(device), load_linearized(None)
    precision = resolve_precision("auto", device)
    settings = config.comparison
    with TerminalCallbacks() as callbacks:
        evaluator = Evaluator(
            teacher, settings, seed=config.seed, precision=precision, callbacks=callbacks
        )
        same = evaluator.sample("teacher", teacher.model)
        with artifact.apply(file, teacher.model) as model:
            student = evaluator.sample("student", model)
        evaluator.noise = draw_noise(
            teacher.latent_shape, settings.num_samples, config.seed + _OTHER_SEED
        )
        other = evaluator.sample("teacher, other noise", teacher.model)
    return [_describe(samples, same, other, evaluator) for samples in (same, student)]


def _describe(samples: Samples, same: Samples, other: Samples, evaluator: Evaluator) -> Row:
    digits, directions = evaluator.labels
    distances = {
        name: 0.0
        if samples is each
        else metrics.frechet_distance_of(samples.features, each.features)
        for name, each in (("paired", same), ("unpaired", other))
    }
    return {
        "model": samples.model,
        "videos": len(samples.latents),
        "digit": metrics.accuracy(samples.digit_logits, digits),
        "motion": metrics.accuracy(samples.motion_logits, directions),
        **distances,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample, write and show both rows."""
    config = parse(FloorConfig, argv, description=__doc__)
    rows = run(config)
    folder = RESULTS_FOLDER if config.record else config.out
    folder.mkdir(parents=True, exist_ok=True)
    write_record(
        folder / _RECORD_NAME,
        title="Embedded model: the student beside the teacher of other noise",
        command=f"python -m research.floor {to_flags(config, without=('out', 'device'))}",
        rows=rows,
        device=resolve_device(config.device),
    )
    sys.stdout.write(show_rows(rows))


if __name__ == "__main__":
    run_command(main)
