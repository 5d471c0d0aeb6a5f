"""Brightness spectra: how much of a video lies in coarse and fine detail, in slow and fast change.

A model that smooths loses the high end; one that adds grain or flicker raises it, even where single
pictures look right (Durall et al. 2020). Natural power falls as 1/f^2 over space (Field 1987) and
over time (Dong and Atick 1995).
"""

import torch
from torch import Tensor

# Power of rounding to 8 bits, which is white: what is weaker no picture shows.
_INVISIBLE = (1 / 255) ** 2 / 12


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
