"""Motion of videos without a trained network: displacements of blocks by phase correlation.

A block's displacement from one frame to the next is found to whole pixels at the peak of the phase
correlation (Kuglin and Hines 1975), then to fractions by the plane that lies through the phases of
the cross-power spectrum (Stone et al. 2001). A window that stands still drags the answer towards
zero, so the second frame's window follows the displacement found so far and the plane is fitted
again, as particle image velocimetry does (Westerweel 1997).
"""

import math

import torch
from torch import Tensor

_BLOCK = 16
_NUM_FITS = 6
# Blocks that correlate less once aligned show something else.
_SAME_CONTENT = 0.5
# Share of the largest magnitude under which a frequency's phase is rounding error.
_FAINT = 1e-3
_TINY = 1e-12


def motion_energy(frames: Tensor) -> Tensor:
    """Measure how far what is visible moves, in pixels a frame.

    `sum w |d| / sum w` over pairs of neighbouring frames and blocks of up to 16 pixels that overlap
    by half: d is a block's displacement, w its variance, so that empty background counts for
    nothing. Twice the speed is twice the energy. Content that is not found again (correlation below
    one half) counts as standing still: noise, flicker and cuts are no motion. Displacements of more
    than half a block are not found.

    frames: [B, F, H, W] floating, F >= 2, H and W >= 4.

    Returns [B] fp32 in [0, 11.4]; 0 is a still.
    Raises ValueError for fewer frames or pixels.
    """
    _, F, H, W = frames.shape
    if F < 2 or min(H, W) < 4:
        raise ValueError(
            f"{F} frames of {H} x {W} given; motion needs 2 or more frames of 4 x 4 or more"
        )
    # One video at a time bounds the memory.
    return torch.stack([_motion_energy(clip.float()) for clip in frames])


def find_displacements(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find where the content of each block of a frame lies in the next frame.

    frames: [F, H, W] fp32, F >= 2, H and W >= 4.

    Returns, for K blocks, the displacement [F - 1, K, 2] in pixels, down and right; the blocks'
    variance [F - 1, K]; and the correlation [F - 1, K] in [-1, 1] of the content once aligned.
    """
    F, H, W = frames.shape
    size = torch.tensor([min(_BLOCK, H), min(_BLOCK, W)], device=frames.device)
    corners = torch.cartesian_prod(_spread(H), _spread(W)).to(frames.device)
    corners = corners.expand(F - 1, -1, -1)
    shift = torch.zeros_like(corners, dtype=torch.float32)
    block = _cut(frames[:-1], corners, shift)
    spectrum = torch.fft.rfft2(block)

    def cross(shift: Tensor) -> Tensor:
        return torch.fft.rfft2(_cut(frames[1:], corners, shift)) * spectrum.conj()

    shift = _peak(cross(shift), block.shape[-2:])
    for _ in range(_NUM_FITS):
        shift = shift.round() + _fit_plane(cross(shift), block.shape[-1])
        shift = torch.clamp(shift, -size / 2, size / 2)
    found = _move_back(_cut(frames[1:], corners, shift), shift - shift.round())
    power, found_power = (x.square().mean(dim=(-2, -1)) for x in (block, found))
    correlation = (block * found).mean(dim=(-2, -1)) / (power * found_power).sqrt().clamp_min(_TINY)
    return shift, power, correlation


def _motion_energy(clip: Tensor) -> Tensor:
    shift, power, correlation = find_displacements(clip)
    lengths = shift.norm(dim=-1) * (correlation > _SAME_CONTENT)
    return (power * lengths).sum() / power.sum().clamp_min(_TINY)


def _spread(length: int) -> Tensor:
    """Return where blocks start along an axis: evenly from end to end, half a block apart."""
    size = min(_BLOCK, length)
    count = 1 + math.ceil(2 * (length - size) / size)
    return torch.linspace(0, length - size, count).round().long()


def _cut(frames: Tensor, corners: Tensor, shift: Tensor) -> Tensor:
    """Return blocks [F, K, h, w] displaced by shift [F, K, 2], windowed, of mean 0.

    The block moves by whole pixels and the window in it by the rest. Beyond a frame's edge its last
    pixels go on.
    """
    whole = shift.round()
    indices, windows = [], []
    for axis, length in enumerate(frames.shape[1:]):
        steps = torch.arange(min(_BLOCK, length), device=frames.device)
        index = (corners + whole.long())[..., axis, None] + steps
        indices.append(index.clamp(0, length - 1))
        phase = (steps + 1 - (shift - whole)[..., axis, None]) / (len(steps) + 1)
        windows.append((math.pi * phase.clamp(0, 1)).sin().square())
    number = torch.arange(len(frames), device=frames.device).view(-1, 1, 1, 1)
    blocks = frames[number, indices[0][..., :, None], indices[1][..., None, :]]
    window = windows[0][..., :, None] * windows[1][..., None, :]
    mean = (blocks * window).sum(dim=(-2, -1)) / window.sum(dim=(-2, -1))
    return window * (blocks - mean[..., None, None])


def _peak(cross: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the peak [..., 2] of the phase correlation, in whole pixels."""
    magnitude = cross.abs()
    faint = _FAINT * magnitude.amax(dim=(-2, -1), keepdim=True) + _TINY
    surface = torch.fft.irfft2(cross / (magnitude + faint), s=size)
    peak = surface.flatten(-2).argmax(dim=-1)
    place = torch.stack([peak // size[1], peak % size[1]], dim=-1)
    limits = torch.tensor(size, device=cross.device)
    return torch.where(place > limits // 2, place - limits, place).float()


def _move_back(blocks: Tensor, shift: Tensor) -> Tensor:
    """Return blocks [..., h, w] moved by less than a pixel, against shift [..., 2]."""
    h, w = blocks.shape[-2:]
    turns = shift @ _frequencies(h, w, blocks.device).T
    phases = torch.polar(torch.ones_like(turns), 2 * math.pi * turns).unflatten(-1, (h, -1))
    return torch.fft.irfft2(torch.fft.rfft2(blocks) * phases, s=(h, w))


def _frequencies(height: int, width: int, device: torch.device) -> Tensor:
    """Return the frequencies [K, 2] of `rfft2`, in cycles a pixel, down and right."""
    down, right = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    return torch.cartesian_prod(down, right).to(device)


def _fit_plane(cross: Tensor, width: int) -> Tensor:
    """Return the displacement [..., 2] of less than a pixel whose phases fit the cross spectrum.

    Least squares over the frequencies k of `phase = -2 pi k d`, weighted by magnitude.
    """
    k = _frequencies(cross.shape[-2], width, cross.device)
    # The phase of the highest frequency has no sign.
    weight = cross.abs().flatten(-2) * (k.abs() < 0.5).all(dim=-1)
    turns = -cross.angle().flatten(-2) / (2 * math.pi)
    normal = torch.einsum("...k,ki,kj->...ij", weight, k, k)
    # Along an edge any displacement fits; the least of them is taken.
    trace = normal.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    normal = normal + (_FAINT * trace + _TINY)[..., None, None] * torch.eye(2, device=k.device)
    moment = torch.einsum("...k,ki->...i", weight * turns, k)
    return torch.linalg.solve(normal, moment).clamp(-1, 1)
