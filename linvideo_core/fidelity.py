"""What videos keep of their teacher's, measured without a trained network: motion, light, detail.

Each column tells of one loss: `motion_energy` of slower motion, `motion_ratio` of less change of
any kind, `flicker` of unsteady light, the spectra of blur or grain and of jitter or stillness.
"""

import dataclasses
from typing import Any

from torch import Tensor

from .evaluation import flicker, frame_difference
from .motion import motion_energy
from .spectrum import log_spectral_distance, spatial_spectrum, temporal_spectrum


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoStatistics:
    """Means over one model's videos: see `motion`, `evaluation` and `spectrum`."""

    motion_energy: float
    frame_difference: float
    flicker: float
    spatial_spectrum: Tensor
    temporal_spectrum: Tensor


def summarize_videos(frames: Tensor) -> VideoStatistics | None:
    """Return the statistics of videos; None for fewer than 3 frames or 4 x 4 pixels.

    frames: [B, F, H, W] floating in [0, 1].
    """
    _, F, H, W = frames.shape
    if F < 3 or min(H, W) < 4:
        return None
    return VideoStatistics(
        motion_energy=motion_energy(frames).mean().item(),
        frame_difference=frame_difference(frames).mean().item(),
        flicker=flicker(frames).mean().item(),
        spatial_spectrum=spatial_spectrum(frames).mean(dim=0),
        temporal_spectrum=temporal_spectrum(frames).mean(dim=0),
    )


def compare_videos(
    videos: VideoStatistics | None, teacher: VideoStatistics | None
) -> dict[str, Any]:
    """Return the row's columns; none where there are no statistics.

    `motion_energy` and `motion_ratio` are shares of the teacher's, None where it has none at all.
    `flicker` is the videos' own. The spectra's distances are in dB, 0 for the same.
    """
    if videos is None or teacher is None:
        return {}
    return {
        "motion_energy": ratio(videos.motion_energy, teacher.motion_energy),
        "motion_ratio": ratio(videos.frame_difference, teacher.frame_difference),
        "flicker": videos.flicker,
        "spatial_spectrum_db": log_spectral_distance(
            videos.spatial_spectrum, teacher.spatial_spectrum
        ),
        "temporal_spectrum_db": log_spectral_distance(
            videos.temporal_spectrum, teacher.temporal_spectrum
        ),
    }


def ratio(value: float | None, teacher: float | None) -> float | None:
    """Return a value as a share of the teacher's; None where either is missing or it has none."""
    return value / teacher if teacher and value is not None else None
