"""What softmax layers cost by each kernel: `python -m benchmarks.models.softmax_layers`.

Whole models at published sizes with random weights: all layers softmax, and with some of them
linear, each by FlashAttention, which ComfyUI takes by itself, by cuDNN and by sparse attention.
Density and size decide what sparse attention takes, not what a model has learned. A kernel must
agree with its definition before it is timed; ratios are those of one run.
    python -m benchmarks.models.softmax_layers --record     # cuda: Wan 1.3B 480p and 14B 720p
    python -m benchmarks.models.softmax_layers --shapes tiny --density 0.2
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.kernels.softmax import DENSITY, SPARSE, why_not_sparse
from linvideo_core.run.config import option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device

from .. import record
from ..kernels.contenders import HEAD_DIM, make_sparse
from .cli import check_shapes
from .measuring import DTYPES, Row, check_memory, find_softmax, measure_size
from .sizes import SIZES, VIDEO_STEPS, Size

RECORD_NAME = "softmax_layers.json"
RECORD_TITLE = "Layers that stay softmax: what each kernel costs, and what sparse ones do to videos"

_PART = "speed"
# The first one is what all are compared with; a CPU has the default alone.
_BACKENDS = {"cpu": ("default",), "cuda": ("fa2", "cudnn")}
_FEW_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """Which sizes, and how sparse."""

    shapes: str = option("1.3b-480p,14b-720p", f"models and videos, of {', '.join(SIZES)}")
    density: str = option(str(DENSITY), "shares of exact key blocks, with a comma between two")
    device: str = device_option()
    out: Path = option(Path("runs/benchmark"), "folder of what was measured")
    record: bool = option(False, f"write results/{RECORD_NAME}, not the one in --out")

    def __post_init__(self) -> None:
        check_shapes(self.shapes)

    @property
    def path(self) -> Path:
        """Where the table goes."""
        return (record.RESULTS_FOLDER if self.record else self.out) / RECORD_NAME


def run(config: SoftmaxConfig) -> dict[str, Any]:
    """Check agreement, measure, and write the record's rows of speed; return the record.

    Raises ValueError, before anything is measured, where a size or sparse attention cannot be had.
    """
    device = resolve_device(config.device)
    sizes = [SIZES[name] for name in config.shapes.split(",")]
    for size in sizes:
        check_memory(size, device)
    if reason := why_not_sparse(torch.device(device), HEAD_DIM, DTYPES[device]):
        raise ValueError(f"sparse attention cannot be measured here: {reason}")
    known, _ = find_softmax(device)
    softmax = {name: known[name] for name in _BACKENDS[device]}
    densities = {f"{SPARSE} {density}": float(density) for density in config.density.split(",")}
    softmax |= {name: make_sparse(density) for name, density in densities.items()}
    command = to_flags(config, without=("out", "record", "device"))
    rows, details = [], []
    for size in sizes:
        found = measure_size(size, softmax, 0.0, device)
        if left_out := found["left_out"]:
            raise RuntimeError("; ".join(left_out))
        details.append(found)
        rows += to_rows(size, found["rows"], densities)
        written = record.write_part(
            config.path,
            _PART,
            title=RECORD_TITLE,
            command=f"python -m benchmarks.models.softmax_layers {command}",
            rows=rows,
            device=device,
            details={"runs": details},
        )
    return written


def to_rows(size: Size, measured: Sequence[Row], densities: dict[str, float]) -> list[Row]:
    """Return the record's rows of one size, seconds being those of the denoiser for a whole video.

    A video of the usual steps is guided, two calls a step; one of few steps is not. All are
    compared with the guided one of what was measured first: every layer by one dense kernel.
    """
    video = 2 * VIDEO_STEPS
    baseline = measured[0]
    return [
        {
            "what": _PART,
            "model": size.model,
            "resolution": size.resolution,
            "where": "headless",
            "softmax_backend": SPARSE if found["kept"] in densities else found["kept"],
            "density": densities.get(found["kept"], 1.0),
            "linear_layers": found["num_linear"],
            "steps": steps,
            "seconds": calls * found["seconds"],
            "speedup": video * baseline["seconds"] / (calls * found["seconds"]),
            "baseline": f"{baseline['kept']}, {VIDEO_STEPS} steps",
            "peak_gb": found["peak_gb"],
        }
        for steps, calls in ((VIDEO_STEPS, video), (_FEW_STEPS, _FEW_STEPS))
        for found in measured
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(SoftmaxConfig, argv, description=__doc__)
    found = run(config)
    rows = [row for row in found["rows"] if row["what"] == _PART]
    sys.stdout.write(f"\n{found['title']}\n\n{record.show_rows(rows)}\n")
    sys.stdout.write(f"table: {config.path.parent}\n")


if __name__ == "__main__":
    run_command(main)
