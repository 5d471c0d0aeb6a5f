"""What measured times mean: ratios to the softmax model of the same run, shares of the peak."""

from collections.abc import Mapping, Sequence
from typing import Any

from .arithmetic import count_flops, find_peak
from .measuring import Measured
from .sizes import SIZES, Size

Row = dict[str, Any]


def to_rows(run: Mapping[str, Any]) -> list[Row]:
    """Turn what `measuring` kept of a run into the record's rows."""
    measured = [Measured(**row) for row in run["rows"]]
    return assemble_rows(SIZES[run["size"]], run["where"], measured, run["device"])


def assemble_rows(
    size: Size, where: str, measured: Sequence[Measured], device_name: str, gpus: int = 1
) -> list[Row]:
    """Turn one run's measurements into the record's rows.

    Each baseline, the softmax model by one backend, has a row of its own, one of the linearized
    model whose kept layers it computes, and one where the fastest backend computes them. Compiled
    models are compared with compiled ones.
    """
    rows = []
    for is_compiled in (False, True):
        alike = [m for m in measured if m.is_compiled == is_compiled]
        linear = [m for m in alike if m.num_linear]
        best = min(linear, key=lambda m: m.seconds, default=None)
        for baseline in (m for m in alike if not m.num_linear):
            compared = [baseline, *(m for m in linear if m.kept == baseline.kept or m is best)]
            rows += [_make_row(size, where, m, baseline, device_name, gpus) for m in compared]
    return rows


def _make_row(
    size: Size, where: str, found: Measured, baseline: Measured, device_name: str, gpus: int
) -> Row:
    peak = find_peak(device_name)
    flops = count_flops(size, found.num_linear)
    return {
        "model": size.model,
        "resolution": size.resolution,
        "what": "denoise",
        "where": where,
        "linear_layers": found.num_linear,
        "baseline": baseline.kept,
        "kept_layers": found.kept,
        "compiled": found.is_compiled,
        "speedup": baseline.seconds / found.seconds,
        "seconds": found.seconds,
        "peak_gb": found.peak_gb,
        "mfu": flops / found.seconds / (gpus * peak) if peak else None,
        "video_seconds": found.video_seconds,
        "video": found.video,
        "gpus": gpus,
    }
