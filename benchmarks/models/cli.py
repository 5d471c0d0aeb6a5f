"""Measure whole models at real sizes: `python -m benchmarks.models`.

One call of the denoiser and a whole guided video, softmax by every backend beside the model with
linear layers. Weights are random in the published shapes: time and memory do not depend on what a
model has learned. A model must agree with the plain one before it is timed, and ratios are those of
one run. `benchmarks.in_app` measures sampling inside ComfyUI.
    python -m benchmarks.models                          # cuda: Wan 1.3B and 14B; cpu: tiny
    python -m benchmarks.models --shapes 14b-720p --compiled --record
Each size is written as soon as it is measured. Its rows replace earlier ones in the table of --out
or, with --record, of results; those of other sizes stay, so they can be measured one by one.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linvideo_core.run.config import option, parse, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError

from .. import record
from .measuring import Row, check_memory, find_softmax, measure_size, to_rows
from .sizes import SIZES, Size

RECORD_NAME = "scale.json"
RECORD_TITLE = "Whole models with random weights: denoiser calls, 50-step videos, training steps"

_SHAPES = {"cpu": "tiny", "cuda": "1.3b-480p,14b-480p,14b-720p"}
# What the rows of this command are called in a record that others fill, too.
_PART = "denoise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Which sizes, compared how, and how patiently."""

    device: str = option(
        "auto", "what is measured; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    shapes: str | None = option(
        None, f"models and videos, of {', '.join(SIZES)}; none: tiny, cuda all others"
    )
    compiled: bool = option(False, "also with compiled blocks")
    video_seconds: float = option(
        60.0,
        "longest whole video that is sampled, by the default backend; others are computed from "
        "their calls",
    )
    out: Path = option(Path("runs/benchmark"), "folder of what was measured")
    record: bool = option(False, "write results/scale.json, not the one in --out")

    def __post_init__(self) -> None:
        if self.shapes is not None:
            check_shapes(self.shapes)

    @property
    def path(self) -> Path:
        """Where the table goes."""
        return (record.RESULTS_FOLDER if self.record else self.out) / RECORD_NAME


def check_shapes(shapes: str) -> None:
    """Raise SettingError for what are no names of sizes."""
    if not set(shapes.split(",")) <= set(SIZES):
        raise SettingError(
            f"{{shapes}} {shapes} given; names of {', '.join(SIZES)} are needed, with a comma "
            "between two",
            "shapes",
        )


def run(config: ScaleConfig) -> dict[str, Any]:
    """Check agreement, measure, and write the record after each size; return it.

    Raises ValueError, before anything is measured, where a size cannot be had, and where the record
    has rows of another device.
    """
    device = resolve_device(config.device)
    names = dict.fromkeys((config.shapes or _SHAPES[device]).split(","))
    sizes = [SIZES[name] for name in names]
    for size in sizes:
        check_memory(size, device)
    record.check_parts(config.path, device)
    softmax, absent = find_softmax(device)
    for size in sizes:
        found = measure_size(size, softmax, config.video_seconds, device, compiled=config.compiled)
        found["left_out"] = [*absent, *found["left_out"]]
        written = _write(config, size, found, device)
    return written


def _write(config: ScaleConfig, size: Size, found: dict[str, Any], device: str) -> dict[str, Any]:
    """Put a size into the record: others that it holds stay."""
    config = dataclasses.replace(config, device=device, shapes=size.name)
    command = f"python -m benchmarks.models {to_flags(config, without=['out', 'record'])}"
    found |= record.describe_source(command, device)

    def change(_: list[Row], source: Row) -> tuple[list[Row], Row]:
        kept = record.without(source.get("runs", []), [found], ("size", "where"))
        order = list(SIZES)
        runs = sorted([*kept, found], key=lambda run: order.index(run["size"]))
        rows = [row for run in runs for row in to_rows(run)]
        return rows, {**(source if kept else {}), "runs": runs}

    return record.change_part(
        config.path, _PART, change, title=RECORD_TITLE, command=command, device=device
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(ScaleConfig, argv, description=__doc__)
    found = run(config)
    for each in found["details"]["parts"][_PART]["runs"]:
        sys.stdout.writelines(f"{sentence}\n" for sentence in each["left_out"])
    rows = [row for row in found["rows"] if row["what"] == _PART]
    sys.stdout.write(f"\n{found['title']}\n\n{record.show_rows(rows)}\n")
    sys.stdout.write(f"table: {config.path.parent}\n")
