"""Measures give the known answer on clips, motions and statistics that have one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linvideo_core.evaluate.metrics import (
    accuracy,
    diversity,
    feature_statistics,
    find_displacements,
    flicker,
    frame_difference,
    frechet_distance,
    frechet_distance_of,
    latent_features,
    log_spectral_distance,
    motion_energy,
    sample_distance,
    spatial_spectrum,
    temporal_spectrum,
    velocity_error,
)

EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def moving_bar(speed: int, *, num_frames: int = 9, width: int = 64) -> Tensor:
    """Return [1, F, 4, width]: a bright bar 20 pixels wide that moves to the right."""
    frames = torch.zeros(1, num_frames, 4, width)
    for f in range(num_frames):
        frames[:, f, :, f * speed : f * speed + 20] = 1
    return frames


def random_cov(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T / dim


STILL = torch.full((2, 6, 5, 7), 0.3) * torch.arange(7)
FADE = torch.linspace(0.1, 0.9, 7).view(1, 7, 1, 1).expand(1, 7, 3, 3)


def alternating(depth: float) -> Tensor:
    signs = torch.tensor([1.0, -1.0] * 4)
    return (0.4 * (1 + depth * signs)).view(1, 8, 1, 1).expand(1, 8, 3, 5)


@pytest.mark.parametrize(
    ("measure", "frames", "expected"),
    [
        (frame_difference, STILL, 0),
        (frame_difference, moving_bar(2), 4 / 64),
        (frame_difference, moving_bar(4), 8 / 64),
        (flicker, STILL, 0),
        (flicker, moving_bar(3), 0),
        (flicker, FADE, 0),
        (flicker, torch.zeros(1, 7, 3, 3), 0),
        (flicker, alternating(0.05), 0.05),
        (flicker, alternating(0.3), 0.3),
        (flicker, alternating(1.0), 1.0),
    ],
)
def test_change_from_frame_to_frame_is_measured(
    measure: Callable[[Tensor], Tensor], frames: Tensor, expected: float
) -> None:
    torch.testing.assert_close(measure(frames), torch.full((len(frames),), expected * 1.0), **EXACT)


@pytest.mark.parametrize(
    ("measure", "shape", "needed"),
    [
        (frame_difference, (1, 1, 3, 3), "2 or more"),
        (flicker, (1, 2, 3, 3), "3 or more"),
        (motion_energy, (1, 1, 8, 8), "2 or more frames of 4 x 4 or more"),
        (motion_energy, (1, 3, 3, 8), "2 or more frames of 4 x 4 or more"),
        (motion_energy, (1, 3, 8, 3), "2 or more frames of 4 x 4 or more"),
    ],
)
def test_too_few_frames_or_pixels_are_refused(
    measure: Callable[[Tensor], Tensor], shape: tuple[int, ...], needed: str
) -> None:
    with pytest.raises(ValueError, match=needed):
        measure(torch.zeros(shape))


ZERO, ROOT_A, ROOT_B = torch.zeros(3), torch.tensor([2.0, 3, 0]), torch.tensor([1.0, 1, 2])
SHIFT = torch.arange(3) / 4


@pytest.mark.parametrize(
    ("shift", "root_a", "root_b", "expected"),
    [
        (ZERO, ROOT_A, ROOT_A, 0),
        (SHIFT, ROOT_A, ROOT_A, SHIFT.square().sum()),
        (ZERO, ROOT_A, ROOT_B, (ROOT_A - ROOT_B).square().sum()),
        (ZERO, ROOT_A * math.nan, ROOT_B, math.inf),
    ],
)
def test_frechet_distance_matches_its_closed_form(
    shift: Tensor, root_a: Tensor, root_b: Tensor, expected: float
) -> None:
    a, b = root_a.square().diag(), root_b.square().diag()
    assert frechet_distance(ZERO, a, shift, b) == pytest.approx(float(expected), abs=1e-9)


def test_frechet_distance_is_symmetric_and_sees_shifts_under_any_covariance() -> None:
    mean, a, b = torch.zeros(5), random_cov(5, seed=2), random_cov(5, seed=3)
    forth, back = frechet_distance(mean, a, mean, b), frechet_distance(mean, b, mean, a)
    assert forth == pytest.approx(back, rel=1e-9)
    assert frechet_distance(mean, a, mean + 2, a) == pytest.approx(20, rel=1e-9)


@pytest.mark.parametrize(("rows", "others", "dim"), [(40, 25, 7), (5, 9, 63), (2, 2, 1)])
def test_frechet_distance_of_samples_is_that_of_their_statistics(
    rows: int, others: int, dim: int
) -> None:
    a, b = torch.randn(rows, dim), 2 * torch.randn(others, dim) + 0.5
    expected = frechet_distance(*feature_statistics(a), *feature_statistics(b))
    assert frechet_distance_of(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance_of(a, a + 3) == pytest.approx(9 * dim, rel=1e-5)
    assert frechet_distance_of(a * math.nan, b) == math.inf
    with pytest.raises(ValueError, match="1 sample given"):
        frechet_distance_of(a, b[:1])


def test_diversity_is_zero_for_identical_samples_and_their_distance_otherwise() -> None:
    one = torch.randn(1, 4, 3, 5, 5)
    assert diversity(one.expand(6, 4, 3, 5, 5), [0, 0, 1, 1, 1, 2]) == 0
    pair = torch.cat([one, one + 0.5, one - 7])
    assert diversity(pair, [3, 3, 1]) == pytest.approx(0.5, rel=1e-5)
    # Prompt 1's pairs lie 1, 1 and 2 apart, prompt 2's pair 4: prompts count alike.
    steps = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0]).view(5, 1)
    assert diversity(steps, [1, 1, 1, 2, 2]) == pytest.approx((4 / 3 + 4) / 2)


def test_unrelated_samples_lie_root_two_deviations_apart_and_single_ones_tell_nothing() -> None:
    samples = 3 * torch.randn(12, 20_000)
    assert diversity(samples, [0] * 6 + [1] * 6) == pytest.approx(3 * math.sqrt(2), rel=0.01)
    assert diversity(samples, list(range(12))) is None


def test_feature_statistics_are_those_of_the_rows() -> None:
    features = torch.tensor([[0.0, 2.0], [2.0, 2.0], [4.0, 8.0]])
    mean, cov = feature_statistics(features)
    assert mean.tolist() == [2, 4]
    assert cov.tolist() == [[4, 6], [6, 12]]
    assert feature_statistics(features[:, :1])[1].shape == (1, 1)
    with pytest.raises(ValueError, match="2 or more"):
        feature_statistics(features[:1])


def test_latent_features_tell_look_contrast_and_motion_of_each_channel() -> None:
    latents = torch.zeros(1, 2, 3, 2, 2)
    latents[:, 0] = 5
    latents[:, 1] = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    look, contrast, motion = latent_features(latents).view(3, 2)
    torch.testing.assert_close(look, torch.tensor([5, 1 / 3]), **EXACT)
    assert contrast[0] == 0 and contrast[1] > 0
    assert motion.tolist() == [0, 1]
    assert latent_features(latents[:, :, :1]).isfinite().all()


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize(
    ("scale", "error", "cosine"), [(1, 0, 1), (1.25, 0.25, 1), (2, 1, 1), (-1, 2, -1)]
)
def test_velocity_error_separates_length_from_direction(
    scale: float, error: float, cosine: float
) -> None:
    reference = torch.randn(2, 4, 3, 4, 4)
    expected = torch.full((2,), float(error))
    found = velocity_error(scale * reference, reference)
    torch.testing.assert_close(found[0], expected, **EXACT)
    torch.testing.assert_close(found[1], torch.full((2,), float(cosine)), **EXACT)
    torch.testing.assert_close(sample_distance(scale * reference, reference), expected, **EXACT)


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


STEPS = [(0.0, 0.0), (0.1, 0.0), (0.3, -0.4), (0.5, 0.5), (-0.8, 1.3), (2.4, 1.1), (0.0, -3.6)]


def moving_blob(step: tuple[float, float], size: tuple[int, int, int] = (7, 33, 48)) -> Tensor:
    """Return [1, F, H, W]: a Gaussian blob of deviation 2 that crosses the middle."""
    num_frames, height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    time = torch.arange(num_frames).view(-1, 1, 1) - num_frames / 2
    squares = (y - height / 2 - time * step[0]) ** 2 + (x - width / 2 - time * step[1]) ** 2
    return torch.exp(-squares / 8)[None]


def moving_texture(step: tuple[float, float], num_frames: int = 5) -> Tensor:
    """Return [1, F, 32, 47], cut from 1/f^2 noise that is shifted exactly, by its phases."""
    down, right = torch.fft.fftfreq(40)[:, None], torch.fft.fftfreq(63)
    radius = torch.hypot(down, right)
    radius[0, 0] = math.inf
    spectrum = torch.fft.fft2(torch.randn(40, 63)) / radius
    time = torch.arange(num_frames).view(-1, 1, 1)
    turns = time * (down * step[0] + right * step[1])
    return torch.fft.ifft2(spectrum * torch.exp(-2j * math.pi * turns)).real[None, :, 4:36, 8:55]


@pytest.mark.parametrize("step", STEPS)
def test_what_moves_a_fraction_of_a_pixel_is_measured_within_two_percent(
    step: tuple[float, float],
) -> None:
    frames = moving_texture(step)
    for moving in (moving_blob(step), frames):
        assert motion_energy(moving).item() == pytest.approx(math.hypot(*step), rel=0.02, abs=1e-4)
    shift, _, correlation = find_displacements(frames[0])
    # Into blocks at the edge something new comes.
    usual = shift.median(dim=1).values
    torch.testing.assert_close(usual, torch.tensor(step).expand(4, 2), rtol=0.02, atol=0.02)
    assert correlation.median() > 0.95


def test_twice_the_speed_is_twice_the_energy_at_any_contrast() -> None:
    slow, fast = moving_blob((0.4, 0.3)), moving_blob((0.8, 0.6))
    energy = motion_energy(torch.cat([slow, fast, 0.1 * fast + 0.5]))
    torch.testing.assert_close(energy, torch.tensor([0.5, 1.0, 1.0]), rtol=0.02, atol=0)


def test_one_object_moves_although_most_of_the_picture_stands_still() -> None:
    frames = torch.zeros(1, 7, 64, 96)
    frames[..., :33, :48] = moving_blob((1.0, 0.5))
    assert motion_energy(frames).item() == pytest.approx(math.hypot(1.0, 0.5), rel=0.02)


def test_what_does_not_move_has_no_motion() -> None:
    still = torch.rand(2, 1, 17, 40).expand(2, 4, 17, 40)
    torch.testing.assert_close(motion_energy(still), torch.zeros(2), rtol=0, atol=1e-5)
    assert motion_energy(torch.full((1, 4, 5, 7), 0.3)).item() == 0
    flicker = 1 + 0.3 * torch.tensor([1.0, -1.0] * 4).view(1, 8, 1, 1)
    assert motion_energy(moving_blob((0.0, 0.0), (8, 33, 48)) * flicker).item() < 1e-3
    # What is left of noise and cuts are single blocks that correlate by chance.
    assert motion_energy(torch.rand(1, 6, 32, 32)).item() < 0.1
    cut = torch.cat([moving_texture((0.0, 0.0)), moving_texture((0.0, 0.0))], dim=1)
    assert motion_energy(cut).item() < 0.1 * math.hypot(8, 8)


@pytest.mark.parametrize("size", [(2, 4, 4), (3, 5, 63), (2, 17, 16)])
def test_any_size_is_measured_and_each_video_alone(size: tuple[int, int, int]) -> None:
    frames = torch.rand(3, *size)
    energy = motion_energy(frames)
    assert energy.shape == (3,) and energy.isfinite().all() and (energy >= 0).all()
    torch.testing.assert_close(motion_energy(frames[1:2]), energy[1:2])
    torch.testing.assert_close(motion_energy(frames.double()), energy)
