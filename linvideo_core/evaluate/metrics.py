"""Measures of a student against its teacher: pure functions of tensors, each with its range.

Linear attention loses motion first, which measures of single pictures do not see: it has measures
of its own. Spectra show smoothing, grain and flicker even where single pictures look right (Durall
et al. 2020): natural power falls as 1/f^2 over space (Field 1987) and over time (Dong and Atick
1995).

Motion is found without a trained network. A block's displacement from one frame to the next is
found to whole pixels at the peak of the phase correlation (Kuglin and Hines 1975), then to
fractions by the plane that lies through the phases of the cross-power spectrum (Stone et al. 2001).
A window that stands still drags the answer towards zero, so the second frame's window follows the
displacement found so far and the plane is fitted again, as particle image velocimetry does
(Westerweel 1997).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-12
# Power of rounding to 8 bits, which is white: what is weaker no picture shows.
_INVISIBLE = (1 / 255) ** 2 / 12
_BLOCK = 16
_MOTION_SIDE = 120
_NUM_FITS = 6
# Blocks that correlate less once aligned show something else.
_SAME_CONTENT = 0.5
# Share of the largest magnitude under which a frequency's phase is rounding error.
_FAINT = 1e-3


def measure_videos(frames: Tensor) -> dict[str, Tensor]:
    """Return each measure below, [B] or [B, K]; none for under 3 frames or 4 x 4 pixels.

    frames: [B, F, H, W] floating in [0, 1].
    """
    _, F, H, W = frames.shape
    if F < 3 or min(H, W) < 4:
        return {}
    measures = (motion_energy, frame_difference, flicker, spatial_spectrum, temporal_spectrum)
    return {measure.__name__: measure(frames) for measure in measures}


def brightness(frames: Tensor) -> Tensor:
    """Return the brightness of frames [..., H, W, 3] in colour (Rec. 709), [..., H, W]."""
    return frames @ frames.new_tensor([0.2126, 0.7152, 0.0722])


def to_bytes(video: Tensor) -> Tensor:
    """Return frames, floating in [0, 1] or in uint8, as uint8; what is not finite is black."""
    if video.dtype == torch.uint8:
        return video
    return video.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()


def compare_videos(videos: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the row's columns of two means of `measure_videos`; none where there are no measures.

    `motion_energy` and `motion_ratio` are shares of the teacher's, None where it has none at all.
    `flicker` is the videos' own. The spectra's distances are in dB, 0 for the same.
    """
    if not videos or not teacher:
        return {}
    energies, changes = (
        [side[name].item() for side in (videos, teacher)]
        for name in ("motion_energy", "frame_difference")
    )
    row = {
        "motion_energy": ratio(*energies),
        "motion_ratio": ratio(*changes),
        "flicker": videos["flicker"].item(),
    }
    for name in ("spatial_spectrum", "temporal_spectrum"):
        row[f"{name}_db"] = log_spectral_distance(videos[name], teacher[name])
    return row


def ratio(value: float | None, teacher: float | None) -> float | None:
    """Return a value as a share of the teacher's; None where either is missing or it has none."""
    return value / teacher if teacher and value is not None else None


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of logits [B, K] whose largest is the label's; labels: [B] int64."""
    return (logits.argmax(dim=-1) == labels.to(logits.device)).double().mean().item()


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and covariance [D, D] in fp64 of features [B, D].

    Raises ValueError for fewer than two rows, which have no covariance.
    """
    _check_rows(features)
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
    """Return `frechet_distance` of the statistics of features [B, D] and a reference [B', D].

    The trace of the root is taken as the nuclear norm of `X Y^T` of the centred rows, B by B', so
    that thousands of features of a few samples cost no decomposition of a covariance.

    Raises ValueError for fewer than two rows.
    """
    sides = [rows.detach().double().cpu() for rows in (features, reference)]
    if not all(rows.isfinite().all() for rows in sides):
        return math.inf
    for rows in sides:
        _check_rows(rows)
    means = [rows.mean(dim=0) for rows in sides]
    left, right = (
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip(sides, means, strict=True)
    )
    traces = left.square().sum() + right.square().sum()
    overlap = torch.linalg.svdvals(left @ right.T).sum()
    distance = (means[0] - means[1]).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)


def _check_rows(features: Tensor) -> None:
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample given; a covariance needs 2 or more")


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

    Contrast, flicker and noise count as well as motion; `motion_energy` sees motion alone.

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


def pixel_error(frames: Tensor, reference: Tensor) -> float:
    """Return the root mean square difference of frames of one shape in uint8: 0 the same, to 255.

    The peak signal-to-noise ratio is 20 log10 of 255 over it, in dB.
    """
    return (frames.double() - reference.double()).square().mean().sqrt().item()


def velocity_error(velocity: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Compare velocities [B, ...] at the same state.

    Returns the relative error `|u - v| / |v|` [B] (0 is best) and the cosine [B] in [-1, 1] (1 is
    best), both fp32.
    """
    flat, flat_reference = velocity.float().flatten(1), reference.float().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat, flat_reference, dim=1)
    return sample_distance(velocity, reference), cosine


def motion_energy(frames: Tensor) -> Tensor:
    """Measure how far what is visible moves, in pixels a frame.

    `sum w |d| / sum w` over pairs of neighbouring frames and blocks of up to 16 pixels that overlap
    by half: d is a block's displacement, w its variance, so that empty background counts for
    nothing. Twice the speed is twice the energy. Content that is not found again (correlation below
    one half) counts as standing still: noise, flicker and cuts are no motion. Displacements of more
    than half a block are not found, so frames of 240 pixels or more on their short side are first
    averaged down by a whole factor, to 120 or a little more.

    frames: [B, F, H, W] floating, F >= 2, H and W >= 4.

    Returns [B] fp32 in [0, 11.4 times the factor]; 0 is a still.
    Raises ValueError for fewer frames or pixels.
    """
    _, F, H, W = frames.shape
    if F < 2 or min(H, W) < 4:
        raise ValueError(
            f"{F} frames of {H} x {W} given; motion needs 2 or more frames of 4 x 4 or more"
        )
    factor = max(1, min(H, W) // _MOTION_SIDE)
    # One video at a time bounds the memory.
    clips = (torch.nn.functional.avg_pool2d(clip.float(), factor) for clip in frames)
    return torch.stack([factor * _motion_energy(clip) for clip in clips])


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
