"""Spectra have the power that was put in, at the frequency where it was put."""

import math

import pytest
import torch
from torch import Tensor

from linvideo_core.evaluate.spectrum import (
    log_spectral_distance,
    spatial_spectrum,
    temporal_spectrum,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def noise_with_power(exponent: float, count: int = 100, size: tuple[int, int] = (48, 63)) -> Tensor:
    """Return [count, 1, H, W]: Gaussian noise whose power falls as 1/f^exponent."""
    radius = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1]))
    radius[0, 0] = math.inf
    spectrum = torch.fft.fft2(torch.randn(count, 1, *size)) * radius ** (-exponent / 2)
    return torch.fft.ifft2(spectrum).real


def slope(spectrum: Tensor) -> float:
    """Return the exponent of a power law through bands, the lowest two left out."""
    x = torch.arange(1, len(spectrum) + 1).log()[2:]
    y = spectrum.log()[2:]
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0])
def test_the_spatial_spectrum_of_noise_falls_as_it_was_made_to(exponent: float) -> None:
    spectrum = spatial_spectrum(noise_with_power(exponent)).mean(dim=0)
    assert spectrum.shape == (24,)
    assert slope(spectrum) == pytest.approx(-exponent, abs=0.05)


def test_white_noise_has_its_variance_at_every_frequency_but_next_to_the_mean() -> None:
    noise = 0.3 * torch.randn(4, 41, 33, 40)
    for spectrum in (spatial_spectrum(noise), temporal_spectrum(noise)):
        bands = spectrum.mean(dim=0)[2:]
        torch.testing.assert_close(bands, torch.full_like(bands, 0.09), rtol=0.1, atol=0)


@pytest.mark.parametrize("cycles", [2, 5, 9])
def test_a_wave_has_its_power_at_its_own_frequency(cycles: int) -> None:
    wave = torch.sin(2 * math.pi * cycles * torch.arange(24) / 24)
    over_space = wave.view(1, 1, 1, 24).expand(1, 2, 24, 24)
    over_time = wave.view(1, 24, 1, 1).expand(1, 24, 3, 5)
    assert spatial_spectrum(over_space).argmax().item() == cycles - 1
    assert temporal_spectrum(over_time).argmax().item() == cycles - 1
    still = temporal_spectrum(over_space)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-9)


def test_blur_takes_fine_detail_and_flicker_adds_fast_change() -> None:
    frames = noise_with_power(2.0).view(5, 20, 48, 63)
    blurred = torch.nn.functional.avg_pool2d(frames, 3, stride=1, padding=1)
    share = (spatial_spectrum(blurred) / spatial_spectrum(frames)).mean(dim=0)
    assert share[0] > 0.8 and share[-1] < 0.2
    signs = torch.tensor([1.0, -1.0] * 10).view(1, 20, 1, 1)
    still = frames[:, :1].expand(frames.shape)
    assert temporal_spectrum(still + 0.1 * signs).mean(dim=0).argmax().item() == 9


def test_the_distance_is_the_gain_in_decibels_above_what_can_be_seen() -> None:
    spectrum = 1 + torch.rand(17)
    assert log_spectral_distance(spectrum, spectrum) == 0
    assert log_spectral_distance(4 * spectrum, spectrum) == pytest.approx(20 * math.log10(2), 1e-4)
    half = torch.where(torch.arange(16) < 8, 10.0, 1.0)
    # 10 dB in half of the bands.
    assert log_spectral_distance(half, torch.ones(16)) == pytest.approx(math.sqrt(50), 1e-4)
    black, faint = torch.zeros(8), torch.full((8,), 1e-9)
    assert log_spectral_distance(faint, black) < 0.01
    assert 10 < log_spectral_distance(torch.full((8,), 1e-3), black) < math.inf
