"""Measures of a student against its teacher: pure functions of tensors, each with its range.

Linear attention loses motion first, which measures of single pictures do not see: it has measures
of its own, here and in `motion`. Spectra show smoothing, grain and flicker even where single
pictures look right (Durall et al. 2020): natural power falls as 1/f^2 over space (Field 1987) and
over time (Dong and Atick 1995).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..flow import VelocityFn
from .motion import motion_energy

_TINY = 1e-12
# Power of rounding to 8 bits, which is white: what is weaker no picture shows.
_INVISIBLE = (1 / 255) ** 2 / 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoStatistics:
    """Means over one model's videos: see the functions of the same names."""

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
    row = {
        "motion_energy": ratio(videos.motion_energy, teacher.motion_energy),
        "motion_ratio": ratio(videos.frame_difference, teacher.frame_difference),
        "flicker": videos.flicker,
    }
    for name in ("spatial_spectrum", "temporal_spectrum"):
        row[f"{name}_db"] = log_spectral_distance(getattr(videos, name), getattr(teacher, name))
    return row


def ratio(value: float | None, teacher: float | None) -> float | None:
    """Return a value as a share of the teacher's; None where either is missing or it has none."""
    return value / teacher if teacher and value is not None else None


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest logit is the label's: 0 to 1, 1 is best.

    logits: [B, K] floating. labels: [B] int64, in [0, K).
    """
    return (logits.argmax(dim=-1) == labels.to(logits.device)).double().mean().item()


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and covariance [D, D] in fp64 of features [B, D].

    Raises ValueError for fewer than two rows, which have no covariance.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample given; a covariance needs 2 or more")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).view(features.shape[1], -1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Compute `|mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))` in fp64.

    0 for identical statistics, then upwards, in squared units of the features; infinite when a
    side is not finite. Few samples bias it upwards (with the demo's judge, real clips are 22 from
    themselves at 20 samples and 1.3 at 400): compare equal numbers of samples only.

    mean_a, mean_b: [D]. cov_a, cov_b: [D, D], symmetric, any rank.
    """
    sides = [tensor.detach().double().cpu() for tensor in (mean_a, cov_a, mean_b, cov_b)]
    if not all(tensor.isfinite().all() for tensor in sides):
        return math.inf
    mean_a, cov_a, mean_b, cov_b = sides
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def frechet_distance_of(features: Tensor, reference: Tensor) -> float:
    """Return the Frechet distance between the Gaussians of two sets of features, in fp64.

    The same as `frechet_distance` of their statistics, but the trace of the root is taken as the
    nuclear norm of `X Y^T` of the centred rows, B by B', so that thousands of features of a few
    samples cost no decomposition of a covariance.

    features: [B, D] floating, B >= 2. reference: [B', D] floating, B' >= 2.

    Raises ValueError for fewer than two rows.
    """
    sides = [rows.detach().double().cpu() for rows in (features, reference)]
    if not all(rows.isfinite().all() for rows in sides):
        return math.inf
    if min(map(len, sides)) < 2:
        raise ValueError(f"{min(map(len, sides))} sample given; a covariance needs 2 or more")
    means = [rows.mean(dim=0) for rows in sides]
    left, right = (
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip(sides, means, strict=True)
    )
    traces = left.square().sum() + right.square().sum()
    overlap = torch.linalg.svdvals(left @ right.T).sum()
    distance = (means[0] - means[1]).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)


def latent_features(latents: Tensor) -> Tensor:
    """Describe videos without a trained judge: look, contrast and motion of every channel.

    latents: [B, C, F, H, W] floating, F >= 1.

    Returns [B, 3C] fp32: means, standard deviations, mean absolute temporal differences.
    """
    _, _, F, H, W = latents.shape
    latents = latents.float()
    per_channel = latents.flatten(2)
    # A sum over no differences is 0: a single frame does not move.
    motion = latents.diff(dim=2).abs().sum(dim=(2, 3, 4)) / (max(F - 1, 1) * H * W)
    return torch.cat([per_channel.mean(dim=2), per_channel.std(dim=2), motion], dim=1)


def frame_difference(frames: Tensor) -> Tensor:
    """Measure how much pictures change from frame to frame: mean |x[f + 1] - x[f]|.

    Contrast, flicker and noise count as well as motion; `motion.motion_energy` sees motion alone.

    frames: [B, F, H, W] floating in [0, 1], F >= 2.

    Returns [B] fp32 in [0, 1]; 0 is a still, and faster motion gives more.
    """
    _, F, _, _ = frames.shape
    if F < 2:
        raise ValueError(f"{F} frame given; motion needs 2 or more")
    return frames.float().diff(dim=1).abs().mean(dim=(1, 2, 3))


def flicker(frames: Tensor) -> Tensor:
    """Measure how much the whole picture's brightness b jumps back and forth.

    `mean |b[f + 1] - 2 b[f] + b[f - 1]| / (4 mean b)`: a clip that alternates between (1 + a) and
    (1 - a) times its mean has flicker a; steady light and an even fade have 0.

    frames: [B, F, H, W] floating in [0, 1], F >= 3.

    Returns [B] fp32 from 0 upwards, about 1 at most; 0 for a black clip.
    """
    _, F, _, _ = frames.shape
    if F < 3:
        raise ValueError(f"{F} frames given; flicker needs 3 or more")
    brightness = frames.float().mean(dim=(2, 3))
    jumps = brightness.diff(n=2, dim=1).abs().mean(dim=1)
    return jumps / (4 * brightness.mean(dim=1)).clamp_min(_TINY)


def spatial_spectrum(frames: Tensor) -> Tensor:
    """Return the power of brightness by spatial frequency, averaged over directions and frames.

    frames: [B, F, H, W] floating in [0, 1], H and W >= 4.

    Returns [B, K] fp32, K = min(H, W) // 2: at (k + 1) / min(H, W) cycles a pixel. White noise of
    variance v has v in every band.
    """
    B, _, H, W = frames.shape
    size = min(H, W)
    window = _hann(H, frames)[:, None] * _hann(W, frames)
    power = torch.fft.fft2(_centre(frames.float(), window, dims=(-2, -1))).abs().square()
    power = (power / window.square().sum()).mean(dim=1).flatten(1)
    down, right = (torch.fft.fftfreq(length, device=frames.device) for length in (H, W))
    band = (torch.hypot(down[:, None], right) * size).round().long().flatten()
    # Band 0 is the mean; the corners hold diagonals alone.
    bands = band.clamp(max=size // 2 + 1)
    sums = power.new_zeros(B, size // 2 + 2).index_add(1, bands, power)
    return (sums / bands.bincount(minlength=size // 2 + 2).clamp_min(1))[:, 1:-1]


def temporal_spectrum(frames: Tensor) -> Tensor:
    """Return the power of each pixel's brightness by temporal frequency, averaged over pixels.

    frames: [B, F, H, W] floating in [0, 1], F >= 2.

    Returns [B, F // 2] fp32: at (k + 1) / F cycles a frame. White noise of variance v has v.
    """
    _, F, _, _ = frames.shape
    window = _hann(F, frames)[:, None, None]
    power = torch.fft.rfft(_centre(frames.float(), window, dims=(1,)), dim=1).abs().square()
    return (power[:, 1:] / window.square().sum()).mean(dim=(2, 3))


def log_spectral_distance(spectrum: Tensor, reference: Tensor) -> float:
    """Return the root mean square of `10 log10 (P / P_ref)` over bands, in dB (Gray, Markel 1976).

    Both have the power of rounding to 8 bits added, below which nothing can be seen: 0 for the
    same spectrum, 20 log10 g for g times the contrast.

    spectrum, reference: [K] floating, K >= 1.
    """
    ratio = (spectrum.double() + _INVISIBLE) / (reference.double() + _INVISIBLE)
    return (10 * ratio.log10()).square().mean().sqrt().item()


def _hann(length: int, like: Tensor) -> Tensor:
    # Without its zeros at both ends, so that short axes keep every sample.
    return torch.hann_window(length + 2, periodic=False, device=like.device)[1:-1]


def _centre(frames: Tensor, window: Tensor, dims: tuple[int, ...]) -> Tensor:
    mean = (frames * window).sum(dim=dims, keepdim=True) / window.sum()
    return window * (frames - mean)


def diversity(samples: Tensor, prompts: Sequence[int]) -> float | None:
    """Return how far samples [B, ...] of one prompt lie apart; None where none was sampled twice.

    The mean over pairs of one prompt, then over prompts, of the root mean square difference: 0
    where noise changes nothing, sqrt(2) standard deviations where samples are unrelated. Noise
    within the samples counts as variety: read it beside a Frechet distance.

    prompts: the number of each sample's prompt.
    """
    flat = samples.float().flatten(1)
    numbers = torch.tensor(prompts, device=flat.device)
    groups = [flat[numbers == number] for number in dict.fromkeys(prompts)]
    distances = [torch.pdist(group).mean() for group in groups if len(group) > 1]
    return (torch.stack(distances).mean() / flat.shape[1] ** 0.5).item() if distances else None


def sample_distance(latents: Tensor, reference: Tensor) -> Tensor:
    """Return `|a - b| / |b|` [B] fp32 of samples [B, ...] from the same noise and prompt.

    0 for the same sample, about 1.4 for unrelated ones of equal size.
    """
    difference = (latents.float() - reference.float()).flatten(1).norm(dim=1)
    return difference / reference.float().flatten(1).norm(dim=1).clamp_min(_TINY)


def velocity_error(velocity: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Compare velocities [B, ...] at the same state.

    Returns the relative error `|u - v| / |v|` [B] (0 is best) and the cosine [B] in [-1, 1] (1 is
    best), both fp32.
    """
    flat, flat_reference = velocity.float().flatten(1), reference.float().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat, flat_reference, dim=1)
    return sample_distance(velocity, reference), cosine


@torch.no_grad()
def velocity_error_by_sigma(
    velocity_fn: VelocityFn, states: Tensor, references: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare a velocity function with stored velocities, one noise level after another.

    states, references: [K, B, C, F, H, W], latents and their right velocity at K noise levels.
    sigmas: [K] in [0, 1].

    Returns the relative error [K, B] and the cosine [K, B], fp32 (see `velocity_error`).
    """
    pairs = [
        velocity_error(velocity_fn(state, sigma.to(state.device).expand(len(state))), reference)
        for state, reference, sigma in zip(states, references, sigmas, strict=True)
    ]
    errors, cosines = zip(*pairs, strict=True)
    return torch.stack(errors), torch.stack(cosines)
