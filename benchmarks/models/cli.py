"""Measure whole models at real sizes: `python -m benchmarks.models`.

One call of the denoiser and a whole guided video, softmax by every backend beside the model with
linear layers. Weights are random in the published shapes: time and memory do not depend on what a
model has learned. A model must agree with the plain one before it is timed, and ratios are those of
one run. `benchmarks.in_app` measures sampling inside ComfyUI.
    python -m benchmarks.models                          # cuda: Wan 1.3B and 14B; cpu: tiny
    python -m benchmarks.models --shapes 14b-720p --softmax fa2,default --seconds 1 --record
Each size is written as soon as it is measured. Its rows replace earlier ones in the table of --out
or, with --record, of results; those of other sizes stay, so they can be measured one by one.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run.config import option, parse, positive, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError

from .. import record
from .headless import BACKENDS, Setting
from .measuring import Patience, check_memory, measure_size, to_rows
from .sizes import SIZES, Size

RECORD_NAME = "scale.json"
RECORD_TITLE = "Whole models with random weights: denoiser calls, 50-step videos, training steps"

_USUAL = {
    "cpu": {
        "shapes": "tiny",
        "softmax": "default",
        "seconds": 0.2,
        "video_seconds": 10.0,
    },
    "cuda": {
        "shapes": "1.3b-480p,14b-480p,14b-720p",
        "softmax": "fa2,cudnn,default,sage",
        "seconds": 2.0,
        "video_seconds": 60.0,
    },
}
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
    softmax: str | None = option(
        None, f"backends of softmax, of {', '.join(BACKENDS)}; none: default, cuda all"
    )
    compiled: bool = option(False, "also with compiled blocks")
    seconds: float | None = option(
        None, "time after which no further run of a call is started; none: 0.2, cuda 2 but 3 runs"
    )
    video_seconds: float | None = option(
        None,
        "longest whole video that is sampled, by the default backend; others are computed from "
        "their calls; none: 10, cuda 60",
    )
    seed: int = option(0, "seed of weights and inputs")
    out: Path = option(Path("runs/benchmark"), "folder of what was measured")
    record: bool = option(False, "write results/scale.json, not the one in --out")

    def __post_init__(self) -> None:
        if self.seconds is not None:
            positive(self, "seconds")
        for field, known in (("shapes", SIZES), ("softmax", BACKENDS)):
            names = getattr(self, field)
            if names is not None and not set(names.split(",")) <= set(known):
                raise SettingError(
                    f"{{{field}}} {names} given; names of {', '.join(known)} are needed, with a "
                    "comma between two",
                    field,
                )

    @property
    def sizes(self) -> list[Size]:
        """The sizes of a settled config, each once."""
        return [SIZES[name] for name in dict.fromkeys(self.shapes.split(","))]

    @property
    def backends(self) -> list[str]:
        """The softmax backends of a settled config, each once."""
        return list(dict.fromkeys(self.softmax.split(",")))

    @property
    def patience(self) -> Patience:
        """How long is measured."""
        return Patience(seconds=self.seconds, video_seconds=self.video_seconds)

    @property
    def setting(self) -> Setting:
        """Device, dtype and seed of a settled config."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return Setting(torch.device(self.device), dtype, self.seed)

    @property
    def record_path(self) -> Path:
        """Where the table goes."""
        return (record.RESULTS_FOLDER if self.record else self.out) / RECORD_NAME

    def settle(self) -> "ScaleConfig":
        """Return the config with the device that is meant, and its usual settings filled in."""
        device = resolve_device(self.device)
        missing = {k: v for k, v in _USUAL[device].items() if getattr(self, k) is None}
        return dataclasses.replace(self, device=device, **missing)

    def describe_command(self, size: Size) -> str:
        """Return what to type to measure a size again."""
        usual = {k: None for k, v in _USUAL[self.device].items() if getattr(self, k) == v}
        config = dataclasses.replace(self, **{**usual, "shapes": size.name})
        return f"python -m benchmarks.models {to_flags(config, without=['out', 'record'])}"


def run(config: ScaleConfig) -> dict[str, Any]:
    """Check agreement, measure, and write the record after each size; return it.

    Raises ValueError, before anything is measured, where a size cannot be had, and where the record
    has other sizes, or another command's rows, of another device.
    """
    config = config.settle()
    for size in config.sizes:
        check_memory(size, config.setting.device, config.setting.dtype)
    names = {size.name for size in config.sizes}
    runs = record.read_part(config.record_path, _PART).get("runs", [])
    is_replaced = all(run["size"] in names for run in runs)
    without = _PART if is_replaced else ""
    record.check_parts(config.record_path, config.device, without=without)
    for size in config.sizes:
        found = measure_size(
            size, config.backends, config.setting, config.patience, compiled=config.compiled
        )
        written = _write(config, size, found)
    return written


def _write(config: ScaleConfig, size: Size, found: dict[str, Any]) -> dict[str, Any]:
    """Put a size into the record: others that it holds stay."""
    found |= record.describe_source(config.describe_command(size), config.device)
    earlier = record.read_part(config.record_path, _PART)
    place = (found["size"], found["where"])
    kept = [
        run
        for run in earlier.get("runs", [])
        if (run["size"], run["where"]) != place and run["device"] == found["device"]
    ]
    commands = [*(earlier["command"].split(" && ") if kept else ()), found["command"]]
    order = list(SIZES)
    runs = sorted([*kept, found], key=lambda run: order.index(run["size"]))
    return record.write_part(
        config.record_path,
        _PART,
        title=RECORD_TITLE,
        command=" && ".join(dict.fromkeys(commands)),
        rows=[row for run in runs for row in to_rows(run)],
        device=config.device,
        details={"runs": runs},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(ScaleConfig, argv, description=__doc__)
    config = config.settle()
    found = run(config)
    for each in found["details"]["parts"][_PART]["runs"]:
        sys.stdout.writelines(f"{sentence}\n" for sentence in each["left_out"])
    rows = [row for row in found["rows"] if row["what"] == _PART]
    sys.stdout.write(f"\n{found['title']}\n\n{record.show_rows(rows)}\n")
    sys.stdout.write(f"table: {config.record_path.parent}\n")
