"""Exact measures of clips, without any training: where the named sprites go, and what they carry.

A sprite's shape and size are known from its caption. At every place of every frame its outline is
correlated with the picture (normalised cross-correlation). Its track is the path through all frames
with the largest sum of what exceeds one half, squared, found by dynamic programming and refined
below a pixel.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .clips import (
    BAR_HIGH,
    BAR_LOW,
    RADIUS,
    SIDE,
    SIZES,
    SPEEDS,
    Labels,
    bar_coordinate,
    bar_cover,
    shape_masks,
    values_of,
)

_MARGIN = 2
# Pixels a frame, along x and y, that a track can follow: over twice the fastest sprite.
_REACH = 2
_SEEN = 0.5
# Pixels that two sprites' boxes may overlap by.
_TOLERANCE = 0.7
LAG = 8
_PATCH = 12
_MIN_FRAMES = 2
_LOST = float(SIDE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracks:
    """Where the sprites of captions are in clips.

    centres: [B, 4, F, 2], x and y in pixels. correlation: [B, 4, F] in [-1, 1], of the outline.
    is_seen: [B, 4, F], whether the sprite is found there, with nothing before it.
    """

    centres: Tensor
    correlation: Tensor
    is_seen: Tensor


def find_tracks(frames: Tensor, labels: Labels) -> Tracks:
    """Find the sprites that captions name in frames [B, F, 64, 64]."""
    correlations = _correlate(frames, labels)
    maps = _suppress_rivals(correlations, labels)
    # Behind the bar nothing must draw a track to another sprite that looks a little alike.
    scores = (maps - _SEEN).clamp_min(0).square()
    best, steps, size = scores[:, :, 0], [], 2 * _REACH + 1
    for f in range(1, maps.shape[2]):
        before, step = F.max_pool2d(best, size, 1, _REACH, return_indices=True)
        best = before + scores[:, :, f]
        steps.append(step.flatten(2))
    place = best.flatten(2).argmax(dim=2, keepdim=True)
    places = [place]
    for step in reversed(steps):
        place = step.gather(2, place)
        places.append(place)
    place = torch.cat(places[::-1], dim=2)
    correlation = maps.flatten(3).gather(3, place[..., None]).squeeze(-1)
    centres = torch.stack([place % SIDE, place // SIDE], dim=-1) + _refine(correlations, place)
    centres = centres + 0.5
    is_seen = (correlation > _SEEN) & is_clear(labels, centres)
    return Tracks(centres=centres, correlation=correlation, is_seen=is_seen)


def _suppress_rivals(maps: Tensor, labels: Labels) -> Tensor:
    """Set the correlation [B, 4, F, H, W] to 0 where another named sprite's is higher nearby."""
    is_there = labels.is_there[:, :, None, None, None]
    near = F.max_pool2d(torch.where(is_there, maps, -1.0).flatten(0, 1), 5, 1, 2).view_as(maps)
    two, which = near.topk(2, dim=1)
    own = torch.arange(maps.shape[1], device=maps.device).view(1, -1, 1, 1, 1)
    rival = torch.where(which[:, :1] == own, two[:, 1:], two[:, :1])
    return torch.where(maps < rival, 0.0, maps)


def is_clear(labels: Labels, centres: Tensor) -> Tensor:
    """Return whether sprites at centres [B, 4, F, 2] are whole: no bar, no sprite before them."""
    half = values_of(SIZES, labels.size) / 2
    gap = (centres[:, :, None] - centres[:, None]).abs().amax(dim=-1)
    room = (half[:, :, None] + half[:, None])[..., None]
    is_later = torch.ones(4, 4, dtype=torch.bool, device=half.device).triu(1)[None, :, :, None]
    is_other = labels.is_there[:, None, :, None] & is_later
    is_free = ~((gap < room - _TOLERANCE) & is_other).any(dim=2)
    return is_free & (bar_cover(labels, centres) == 0) & labels.is_there[..., None]


def _correlate(frames: Tensor, labels: Labels) -> Tensor:
    """Return the correlation of each named outline with the frames, [B, 4, F, 64, 64].

    An outline is positive inside the shape and negative in a margin around it; the picture's mean
    and variance are those under the outline's window.
    """
    outlines = _outlines(frames.device)
    rows = torch.arange(len(frames), device=frames.device)[:, None]
    around = F.pad(frames, [_WINDOW // 2] * 4, mode="replicate")
    size = around.shape[-2:]
    spectrum = torch.fft.rfft2(outlines[labels.size, labels.shape], s=size).conj()
    product = torch.fft.irfft2(torch.fft.rfft2(around)[:, None] * spectrum[:, :, None], s=size)
    deviations = []
    for width in map(_window_of, SIZES.values()):
        cut = (_WINDOW - width) // 2
        near = around[..., cut : size[0] - cut, cut : size[1] - cut]
        variance = F.avg_pool2d(near.square(), width, 1) - F.avg_pool2d(near, width, 1).square()
        deviations.append(variance.clamp_min(1e-4).sqrt() * width)
    return product[..., :SIDE, :SIDE] / torch.stack(deviations, dim=1)[rows, labels.size]


def _window_of(size: float) -> int:
    """Return the odd width of the window around a sprite of some size."""
    return 2 * (math.ceil(size / 2) + _MARGIN) + 1


_WINDOW = _window_of(max(SIZES.values()))


def _outlines(device: torch.device) -> Tensor:
    """Return every shape at every size, of mean 0 and norm 1 in its window: [2, 9, W, W]."""
    masks = shape_masks(device)[:, None]
    along = torch.arange(_WINDOW, device=device) - _WINDOW // 2
    y, x = torch.meshgrid(along, along, indexing="ij")
    drawn = []
    for size in SIZES.values():
        grid = (torch.stack([x, y], -1) / (size / 2)).expand(len(masks), -1, -1, -1)
        outline = F.grid_sample(masks, grid, align_corners=False)[:, 0]
        window = torch.maximum(x.abs(), y.abs()) <= _window_of(size) // 2
        outline = (outline - outline[:, window].mean(dim=1)[:, None, None]) * window
        drawn.append(F.normalize(outline.flatten(1), dim=1).view_as(outline))
    return torch.stack(drawn)


def _refine(maps: Tensor, place: Tensor) -> Tensor:
    """Return the peak's place below a pixel, x and y in [-0.5, 0.5], by a parabola on each axis."""
    flat = maps.flatten(3)

    def at(dx: int, dy: int) -> Tensor:
        x, y = (place % SIDE + dx).clamp(0, SIDE - 1), (place // SIDE + dy).clamp(0, SIDE - 1)
        return flat.gather(3, (y * SIDE + x)[..., None]).squeeze(-1)

    middle, found = at(0, 0), []
    for dx, dy in ((1, 0), (0, 1)):
        before, after = at(-dx, -dy), at(dx, dy)
        curve = (2 * middle - before - after).clamp_min(1e-6)
        found.append(((after - before) / (2 * curve)).clamp(-0.5, 0.5))
    return torch.stack(found, dim=-1)


def measure_tracks(frames: Tensor, labels: Labels) -> dict[str, Tensor]:
    """Measure every sprite of frames [B, F, 64, 64]; each [B, 4], NaN where it does not apply.

    found: the share of frames in which the sprite is seen, of those in which it should be.
    recall: the correlation of its texture before and after the bar, of sprites whose caption sends
        them behind it; 0 for one that is not seen on both sides.
    position_error: pixels between its track and the path that the caption names, wherever that
        starts; the root mean square over frames; of lines and circles.
    speed_ratio: its speed as a share of the one that the caption names.
    """
    tracks = find_tracks(frames, labels)
    is_there = labels.is_there
    # On other ways than lines the bar may hide a sprite in part nearly all the time.
    is_free = is_there & ((labels.motion < 4) | (labels.bar == 0)[:, None])
    should = is_clear(labels, tracks.centres).sum(dim=2).clamp_min(1)
    measures = {
        "found": (tracks.is_seen.sum(dim=2) / should, is_there),
        "recall": (texture_recall(frames, labels, tracks), labels.crosses),
        "position_error": (position_error(labels, tracks), is_free & (labels.motion < 6)),
        "speed_ratio": (speed_ratio(labels, tracks), is_free),
    }
    return {name: torch.where(valid, x, math.nan) for name, (x, valid) in measures.items()}


def texture_recall(frames: Tensor, labels: Labels, tracks: Tracks) -> Tensor:
    """Return the correlation [B, 4] of a sprite's texture on both sides of the bar.

    Its picture, cut out along its track, is averaged over the frames in which it is seen on each
    side and compared where the shape covers it whole.
    """
    patches = cut_patches(frames, labels, tracks.centres)
    across = bar_coordinate(labels, tracks.centres)
    inside = F.interpolate(shape_masks(frames.device)[:, None], size=_PATCH, mode="area")[:, 0]
    weight = (inside[labels.shape] > 0.9).float().flatten(2)
    sides, counts = [], []
    for is_side in (across < BAR_LOW, across > BAR_HIGH):
        chosen = (tracks.is_seen & is_side).float()
        counts.append(chosen.sum(dim=2))
        mean = torch.einsum("bkf,bkfp->bkp", chosen, patches)
        sides.append(mean / counts[-1].clamp_min(1)[..., None])
    is_whole = torch.stack(counts).amin(dim=0) >= _MIN_FRAMES
    return _weighted_correlation(*sides, weight) * is_whole


def cut_patches(frames: Tensor, labels: Labels, centres: Tensor) -> Tensor:
    """Cut sprites' boxes out of frames along centres [B, 4, F, 2]: [B, 4, F, 144] brightness."""
    B, num_frames = frames.shape[:2]
    extent = values_of(SIZES, labels.size)[:, :, None, None, None, None]
    along = (torch.arange(_PATCH, device=frames.device) + 0.5) / _PATCH - 0.5
    y, x = torch.meshgrid(along, along, indexing="ij")
    places = centres[:, :, :, None, None] + extent * torch.stack([x, y], dim=-1)
    grid = rearrange(2 * places / SIDE - 1, "b k f h w xy -> (b f) k (h w) xy")
    cut = F.grid_sample(frames.reshape(-1, 1, SIDE, SIDE), grid, align_corners=False)
    return rearrange(cut, "(b f) 1 k p -> b k f p", b=B, f=num_frames)


def _weighted_correlation(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum(dim=-1, keepdim=True).clamp_min(1)
    left, right = (
        weight * (x - (weight * x).sum(dim=-1, keepdim=True) / total) for x in (left, right)
    )
    scale = (left.square().sum(dim=-1) * right.square().sum(dim=-1)).sqrt().clamp_min(1e-6)
    return (left * right).sum(dim=-1) / scale


def position_error(labels: Labels, tracks: Tracks) -> Tensor:
    """Return how far a track [B, 4] lies from the named path, in pixels; 64 where it is unseen.

    As complex numbers, z_f = c + a b_f: of a line b_f is the way that its speed and direction make
    and a = 1; of a circle b_f turns at the named speed and |a| = 1, so that its phase is free.
    Both are fitted by least squares over the frames in which the sprite is seen.
    """
    num_frames = tracks.centres.shape[2]
    time = torch.arange(num_frames, device=labels.bar.device, dtype=torch.float32)
    speed, motion = values_of(SPEEDS, labels.speed)[..., None], labels.motion[..., None]
    direction = torch.tensor([1, -1, -1j, 1j], device=time.device)[motion.clamp(max=3)]
    turn = torch.where(motion == 4, 1j, -1j) * speed / RADIUS * time
    basis = torch.where(motion < 4, direction * speed * time, RADIUS * turn.exp())
    track = torch.complex(tracks.centres[..., 0], tracks.centres[..., 1])
    weight = tracks.is_seen.float()
    share = weight / weight.sum(dim=2, keepdim=True).clamp_min(1)
    track, basis = (x - (share * x).sum(dim=2, keepdim=True) for x in (track, basis))
    factor = (share * basis.conj() * track).sum(dim=2, keepdim=True)
    factor = torch.where(motion < 4, torch.ones_like(factor), factor / factor.abs().clamp_min(1e-6))
    square = (share * (track - factor * basis).abs().square()).sum(dim=2)
    return torch.where(weight.sum(dim=2) >= _MIN_FRAMES, square.sqrt(), _LOST)


def speed_ratio(labels: Labels, tracks: Tracks) -> Tensor:
    """Return the median speed [B, 4] over the named one; 0 for a sprite that is hardly seen."""
    way = tracks.centres[:, :, LAG:] - tracks.centres[:, :, :-LAG]
    is_seen = tracks.is_seen[:, :, LAG:] & tracks.is_seen[:, :, :-LAG]
    speeds = way.norm(dim=-1) / LAG
    median = speeds.where(is_seen, math.nan).nanmedian(dim=2).values
    return (median / values_of(SPEEDS, labels.speed)).nan_to_num(0.0)
