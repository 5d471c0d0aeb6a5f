"""Motion is what moves, as far as it moves: on videos whose displacement is known."""

import math

import pytest
import torch
from torch import Tensor

from linvideo_core.evaluate.metrics import find_displacements, motion_energy

STEPS = [(0.0, 0.0), (0.1, 0.0), (0.3, -0.4), (0.5, 0.5), (-0.8, 1.3), (2.4, 1.1), (0.0, -3.6)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 3, 8), (1, 3, 8, 3)])
def test_too_few_frames_or_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 or more frames of 4 x 4 or more"):
        motion_energy(torch.zeros(shape))
