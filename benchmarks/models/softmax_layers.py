"""What softmax layers cost, and what may stand there: `python -m benchmarks.models.softmax_layers`.

Whole models at published sizes with random weights: all layers softmax, and with some of them
linear, each by PyTorch's default, by FlashAttention, which ComfyUI takes by itself, by cuDNN and by
sparse attention; then models without softmax layers: every layer linear, and every layer hybrid
with a small tile and with a large one. Density, tile and size decide what a layer takes, not what a
model has learned. All must agree with their definitions before anything is timed; ratios are those
of one run.
    python -m benchmarks.models.softmax_layers --record     # cuda: Wan 1.3B 480p and 14B 720p
    python -m benchmarks.models.softmax_layers --backends default --density 0.1,0.2,0.4
    python -m benchmarks.models.softmax_layers --shapes tiny --density 0.2 --tile 1x2x3
Rows of one size replace earlier ones in --out or results; those of other sizes stay.
"""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.kernels.softmax import DENSITY, SPARSE, why_not_sparse
from linvideo_core.models.config import LinearForm
from linvideo_core.run.config import option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.transfer.preflight import check_tile

from .. import record
from ..kernels.contenders import HEAD_DIM, Contender, make_sparse
from ..number_lists import read_densities
from .cli import check_shapes
from .measuring import BACKENDS, DTYPES, Row, check_memory, find_softmax, measure_size
from .sizes import SIZES, VIDEO_STEPS, Size

RECORD_NAME = "softmax_layers.json"
RECORD_TITLE = "Layers that stay softmax: what each kernel costs, and what may stand there"

_PART = "speed"
_BACKENDS = {"cpu": "default", "cuda": "default,fa2,cudnn"}
_FEW_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """Which sizes, by which kernels, how sparse, and how large the tiles."""

    shapes: str = option("1.3b-480p,14b-720p", f"models and videos, of {', '.join(SIZES)}")
    backends: str | None = option(
        None,
        f"dense kernels, of {', '.join(BACKENDS)}, the first of which all are compared with; none: "
        f"{_BACKENDS['cuda']}, on a CPU {_BACKENDS['cpu']}",
    )
    density: str = option(str(DENSITY), "shares of exact key blocks, with a comma between two")
    tile: str | None = option(
        None, "tiles of hybrid layers, with a comma between two; none: two of each size's own"
    )
    device: str = device_option()
    out: Path = option(Path("runs/benchmark"), "folder of what was measured")
    record: bool = option(False, f"write results/{RECORD_NAME}, not the one in --out")

    def __post_init__(self) -> None:
        check_shapes(self.shapes)
        self.list_densities()
        for size in self.list_sizes():
            for tile in size.tiles:
                check_tile(LinearForm(tile=tile), [size.grid])

    def list_sizes(self) -> list[Size]:
        """Return the sizes with the tiles that they are to have."""
        sizes = [SIZES[name] for name in self.shapes.split(",")]
        if self.tile is None:
            return sizes
        tiles = tuple(dict.fromkeys(self.tile.split(",")))
        return [dataclasses.replace(size, tiles=tiles) for size in sizes]

    def list_densities(self) -> dict[str, float]:
        """Return the densities by the names that sparse kernels have here."""
        found = read_densities(self.density, "density")
        return {f"{SPARSE} {name}": density for name, density in found.items()}

    @property
    def path(self) -> Path:
        """Where the table goes."""
        return (record.RESULTS_FOLDER if self.record else self.out) / RECORD_NAME


def run(config: SoftmaxConfig) -> dict[str, Any]:
    """Check agreement, measure, and write the record's rows of speed; return the record.

    A kernel that fails is left out, and said. Raises ValueError, before anything is measured, where
    a size or a kernel cannot be had, RuntimeError where that fails which all are compared with.
    """
    device = resolve_device(config.device)
    sizes = config.list_sizes()
    for size in sizes:
        check_memory(size, device)
    record.check_parts(config.path, device)
    if reason := why_not_sparse(torch.device(device), HEAD_DIM, DTYPES[device]):
        raise ValueError(f"sparse attention cannot be measured here: {reason}")
    softmax = _find_dense(config, device)
    densities = config.list_densities()
    softmax |= {name: make_sparse(density) for name, density in densities.items()}
    for size in sizes:
        found = measure_size(size, softmax, 0.0, device, every_layer=True)
        said = "; ".join(found["left_out"])
        if not found["rows"] or found["rows"][0]["kept"] != next(iter(softmax)):
            raise RuntimeError(said)
        if said:
            logging.warning("left out: %s", said)
        written = _write(config, size, found, densities, device)
    return written


def _write(
    config: SoftmaxConfig, size: Size, found: Row, densities: Mapping[str, float], device: str
) -> dict[str, Any]:
    """Put a size's rows into the record: those of other sizes stay."""
    flags = to_flags(config, without=("out", "record", "device"))
    command = f"python -m benchmarks.models.softmax_layers {flags}"
    rows = to_rows(size, found["rows"], densities)

    def change(earlier: list[Row], source: Row) -> tuple[list[Row], Row]:
        kept = record.without(earlier, rows, ("model", "resolution"))
        runs = record.without(source.get("runs", []), [found], ("size",))
        runs.append({**found, "command": command})
        details = {"runs": runs, "command": " && ".join(run["command"] for run in runs)}
        return [*kept, *rows], details

    return record.change_part(
        config.path, _PART, change, title=RECORD_TITLE, command=command, device=device
    )


def _find_dense(config: SoftmaxConfig, device: str) -> dict[str, Contender]:
    known, _ = find_softmax(device)
    names = (config.backends or _BACKENDS[device]).split(",")
    if absent := [name for name in names if name not in known]:
        raise SettingError(
            f"{{backends}} {','.join(names)} given, and {absent[0]} cannot be had here: some of "
            f"{', '.join(known)} are needed",
            "backends",
        )
    return {name: known[name] for name in names}


def to_rows(size: Size, measured: Sequence[Row], densities: Mapping[str, float]) -> list[Row]:
    """Return the record's rows of one size, seconds being those of the denoiser for a whole video.

    A video of the usual steps is guided, two calls a step; one of few steps is not. All are
    compared with the guided one of what was measured first: every layer by one dense kernel.
    Where no softmax layers are left, backend and density are none.
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
            "density": densities.get(found["kept"], 1.0) if found["kept"] else None,
            "linear_layers": 0 if found["tile"] else found["num_linear"],
            "hybrid_layers": found["num_linear"] if found["tile"] else 0,
            "tile": found["tile"],
            "layers": size.config.num_layers,
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
