"""A model's call over the number of tokens: with all its layers softmax, and with some linear."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linvideo_core.run.progress import Progress

from .measuring import Patience, measure_subject
from .sizes import Size
from .teachers import HeadlessSubject, Setting
from .variants import Variant, find_softmax

LAYERS = ("softmax", "linearized")


def list_lengths(base: Size, most_frames: int) -> Iterator[tuple[int, Size]]:
    """Yield latent frames, each time twice as many from 1 up, and the size of such a video."""
    frames = 1
    while frames <= most_frames:
        yield frames, base.with_latent_frames(frames)
        frames *= 2


def measure_length(
    size: Size,
    setting: Setting,
    patience: Patience,
    path: Path,
    progress: Progress,
    facts: Mapping[str, Any],
) -> None:
    """Measure calls of our own model, by PyTorch's default softmax, and write them to `path`."""
    softmax, _ = find_softmax(["default"], setting.device.type)
    variants = [Variant(num_linear=n, kept="default") for n in (0, len(size.layers))]
    patience = dataclasses.replace(patience, video_seconds=0.0)
    teacher = HeadlessSubject(size, softmax, setting)
    measure_subject(teacher, variants, patience, setting.device, path, progress, facts)


def to_rows(size: Size, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn what `measure_length` wrote into points of the picture."""
    return [
        {
            "tokens": size.tokens,
            "layer": LAYERS[row["num_linear"] > 0],
            "milliseconds": 1000 * row["seconds"],
            "extra_mb": 1024 * (row["peak_gb"] - row["weights_gb"]),
        }
        for row in found["rows"]
    ]
