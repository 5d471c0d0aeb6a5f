"""Scenes of textured sprites that move behind a bar over a drifting background, and their clips.

Two to four sprites of different shapes move on lines, on circles, or bounce off the edges. A sprite
on a line across the bar disappears behind it and comes out whole on the other side, with the
texture that it went in with. All that is random comes from one `torch.Generator`: a seed gives a
scene again, on the same kind of device.

A latent holds 4 frames of 2 x 2 pixels, each a channel, scaled to unit variance over all clips. So
the codec is exact, needs no training and is alike for all channels, whose mean is a small picture:
what commands without a decoder show of a video. Of Wan's patches, 1 x 2 x 2 latents, a clip has
4,096.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NUM_FRAMES, SIDE = 64, 64
"""Of a clip: frames, and the pixels of a side."""

SHAPES = ("disc", "square", "triangle", "cross", "ring", "heart", "arch", "hourglass")
MOTIONS = ("right", "left", "up", "down", "clockwise", "counterclockwise", "bouncing")
SPEEDS = {"slow": 0.55, "fast": 0.79}
"""Pixels a frame."""
SIZES = {"small": 10.0, "large": 14.0}
"""Pixels of a sprite's box."""
BARS = ("none", "upright", "level")
PANS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Where the background drifts, x to the right and y downwards, by `PAN_SPEED` pixels a frame."""

NO_SHAPE = len(SHAPES)
MAX_SPRITES = 4
COUNT_SHARES = (0.6, 0.3, 0.1)
"""Shares of the scenes with two, three and four sprites."""
BAR_LOW, BAR_HIGH = 25.0, 39.0
"""Pixels between which the bar lies, upright in x, level in y."""
RADIUS, PAN_SPEED = 20.0, 0.3
HELD_OUT_EVERY = 10

_BITMAP, _TEXTURE = 16, 4
_CELL, _NUM_CELLS = 4.0, 27
_BAR_BRIGHTNESS = 0.02
_PRIME = 2**31 - 1

# Over 1,024 clips of seed 0 pixels have this mean and standard deviation.
FRAME_MEAN, FRAME_STD = 0.2794, 0.1468
_PATCHES = {"r": 4, "p": 2, "q": 2}
LATENT_SHAPE = (16, NUM_FRAMES // 4, SIDE // 2, SIDE // 2)
"""C, F, H, W of a clip's latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """What the captions of scenes say, as indices into the names above.

    shape, motion, speed, size: [B, 4] int64. Sprites come in the order of their shapes, which all
        differ; a later one passes in front. Where there is none `shape` is NO_SHAPE, the rest 0.
    bar, pan: [B] int64.
    """

    shape: Tensor
    motion: Tensor
    speed: Tensor
    size: Tensor
    bar: Tensor
    pan: Tensor

    def __len__(self) -> int:
        return len(self.bar)

    def to(self, device: torch.device | str) -> "Labels":
        """Return the labels on a device."""
        return Labels(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def take(self, rows: Tensor | slice) -> "Labels":
        """Return some of the scenes."""
        return Labels(**{name: tensor[rows] for name, tensor in vars(self).items()})

    @property
    def is_there(self) -> Tensor:
        """Whether there is a sprite in each place, [B, 4] bool."""
        return self.shape != NO_SHAPE

    @property
    def crosses(self) -> Tensor:
        """Whether a sprite goes on a line right through behind the bar, [B, 4] bool."""
        across = torch.where(self.motion < 2, BARS.index("upright"), BARS.index("level"))
        return self.is_there & (self.motion < 4) & (self.bar[:, None] == across)

    @property
    def is_held_out(self) -> Tensor:
        """Whether no training may see this caption, [B] bool: one in ten, by a hash of it."""
        code = torch.zeros_like(self.bar)
        fields = (self.shape, self.motion, self.speed, self.size)
        sprites = zip(*(field.unbind(1) for field in fields), strict=True)
        for shape, motion, speed, size in sprites:
            sprite = ((shape * len(MOTIONS) + motion) * 2 + speed) * 2 + size
            code = code * 4 * len(MOTIONS) * (NO_SHAPE + 1) + sprite
        code = (code * len(BARS) + self.bar) * len(PANS) + self.pan
        for factor, shift in ((48271, 15), (69621, 13), (16807, 11)):
            code = code % _PRIME * factor % _PRIME
            code = code ^ (code >> shift)
        return code % HELD_OUT_EVERY == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """Scenes: what their captions say, and what chance decides besides.

    chance: [B, 4, 3] in [0, 1], where each sprite starts; the sprites of a scene share the first
        two ranges out among them, so that none hides behind another all the time.
    texture: [B, 4, 4, 4], brightness in [0, 1] over each sprite's box.
    background: [B, 27, 27], brightness at every fourth pixel.
    """

    labels: Labels
    chance: Tensor
    texture: Tensor
    background: Tensor

    def take(self, rows: Tensor | slice) -> "Scenes":
        """Return some of the scenes."""
        own = (self.chance[rows], self.texture[rows], self.background[rows])
        return Scenes(
            labels=self.labels.take(rows), chance=own[0], texture=own[1], background=own[2]
        )


class Clips(NamedTuple):
    """Rendered scenes and the truth about them; sprites are in the order of `Labels`.

    frames: [B, F, 64, 64] fp32 in [0, 1]
    centres: [B, 4, F, 2] fp32, x and y of each sprite in pixels
    cover: [B, 4, F] fp32, the share of each sprite's box that the bar covers: 1 when it is hidden
    """

    frames: Tensor
    centres: Tensor
    cover: Tensor


def draw_scenes(count: int, generator: torch.Generator, *, is_held_out: bool = False) -> Scenes:
    """Draw scenes whose captions are held out, or, by default, are not; on the generator's device.

    Labels are drawn in plenty and the first of the right kind are taken: nothing waits for a GPU.
    """
    labels = _draw_labels(24 * count + 256, generator)
    is_wrong = labels.is_held_out != is_held_out
    return stage(labels.take(is_wrong.byte().argsort(stable=True)[:count]), generator)


def stage(labels: Labels, generator: torch.Generator) -> Scenes:
    """Draw what captions leave open; labels: on the generator's device."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(len(labels), *size, generator=generator, device=generator.device)

    chance, is_there = uniform(MAX_SPRITES, 4), labels.is_there
    rank = torch.where(is_there, chance[..., 3], 2).argsort(dim=1).argsort(dim=1)
    number = is_there.sum(dim=1)[:, None, None]
    shared = ((rank[..., None] + chance[..., :2]) / number).clamp(max=1)
    return Scenes(
        labels=labels,
        chance=torch.cat([shared, chance[..., 2:3]], dim=-1),
        texture=0.45 + 0.55 * uniform(MAX_SPRITES, _TEXTURE, _TEXTURE),
        background=0.15 + 0.3 * uniform(_NUM_CELLS, _NUM_CELLS),
    )


def _draw_labels(count: int, generator: torch.Generator) -> Labels:
    device = generator.device

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, (count, *size), generator=generator, device=device)

    shares = torch.tensor(COUNT_SHARES, device=device)
    number = 2 + torch.multinomial(shares, count, replacement=True, generator=generator)
    is_there = torch.arange(MAX_SPRITES, device=device) < number[:, None]
    order = torch.rand(count, NO_SHAPE, generator=generator, device=device).argsort(dim=1)
    shape = torch.where(is_there, order[:, :MAX_SPRITES], NO_SHAPE).sort(dim=1).values
    motion, speed, size = (draw(high, MAX_SPRITES) * is_there for high in (len(MOTIONS), 2, 2))
    bar, pan = draw(len(BARS)), draw(len(PANS))
    return Labels(shape=shape, motion=motion, speed=speed, size=size, bar=bar, pan=pan)


def all_times(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the frame numbers [count, 64] fp32 of whole clips."""
    return torch.arange(NUM_FRAMES, device=device, dtype=torch.float32).expand(count, -1)


def render(scenes: Scenes, times: Tensor | None = None) -> Clips:
    """Draw scenes, at sub-pixel places.

    times: [B, F] fp32, the frames to draw of each scene, from 0 to 63; none: all of them.
    """
    labels = scenes.labels
    if times is None:
        times = all_times(len(labels), scenes.chance.device)
    centres = find_centres(scenes, times)
    extent = values_of(SIZES, labels.size)
    pans = torch.tensor(list(PANS.values()), device=times.device)[labels.pan]
    drift = SIDE / 2 + PAN_SPEED * times[..., None] * pans[:, None]
    wide = torch.full_like(times[:, 0], _CELL * _NUM_CELLS)
    frames = _draw(scenes.background[:, None], drift, wide)[:, 0]
    masks = shape_masks(times.device)[labels.shape]
    textures = F.interpolate(scenes.texture, size=_BITMAP, mode="bilinear", align_corners=False)
    for k in range(MAX_SPRITES):
        # Multiplied by its mask before it is interpolated, so that edges keep their brightness.
        image = torch.stack([masks[:, k], masks[:, k] * textures[:, k]], dim=1)
        alpha, light = _draw(image, centres[:, k], extent[:, k]).unbind(1)
        frames = frames * (1 - alpha) + light
    frames = frames.masked_fill(_bars(times.device)[labels.bar][:, None], _BAR_BRIGHTNESS)
    return Clips(frames.clamp(0, 1), centres, bar_cover(labels, centres))


def values_of(names: dict[str, float], index: Tensor) -> Tensor:
    """Return the values that indices into a table of names stand for."""
    return torch.tensor(list(names.values()), device=index.device)[index]


def find_centres(scenes: Scenes, times: Tensor) -> Tensor:
    """Return where sprites are: centres [B, 4, F, 2] in pixels at times [B, F] in frames."""
    labels, time = scenes.labels, times[:, None]
    half = values_of(SIZES, labels.size)[..., None] / 2
    speed = values_of(SPEEDS, labels.speed)[..., None]
    motion = labels.motion[..., None, None]
    circle = _on_circles(scenes, time, half, speed)
    moved = torch.where(motion < 4, _on_lines(scenes, time, half, speed), circle)
    return torch.where(motion == 6, _bouncing(scenes, time, half, speed), moved)


def _on_lines(scenes: Scenes, time: Tensor, half: Tensor, speed: Tensor) -> Tensor:
    """Start on one side of the bar and end on the other; beside it where the bar lies along."""
    labels = scenes.labels
    u, v, _ = scenes.chance[..., None].unbind(2)
    travel = speed * (NUM_FRAMES - 1)
    # Whole for two frames or more on both sides of the bar.
    lowest = torch.maximum(half, BAR_HIGH + half + speed - travel)
    highest = torch.minimum(BAR_LOW - half - speed, SIDE - half - travel)
    along = lowest + (highest - lowest) * u + speed * time
    motion = labels.motion[..., None]
    along = torch.where((motion == 1) | (motion == 2), SIDE - along, along)
    beside = half + (BAR_LOW - 2 * half) * (2 * v % 1)
    beside = torch.where(v < 0.5, beside, SIDE - beside)
    is_free = labels.crosses | (labels.bar == 0)[:, None]
    lane = torch.where(is_free[..., None], half + (SIDE - 2 * half) * v, beside)
    lane = lane.expand_as(along)
    is_level = (motion < 2)[..., None]
    return torch.where(is_level, torch.stack([along, lane], -1), torch.stack([lane, along], -1))


def _on_circles(scenes: Scenes, time: Tensor, half: Tensor, speed: Tensor) -> Tensor:
    u, v, w = scenes.chance[..., None].unbind(2)
    sense = torch.where(scenes.labels.motion[..., None] == 4, 1.0, -1.0)
    angle = 2 * math.pi * u + sense * speed / RADIUS * time
    room = SIDE / 2 - RADIUS - half
    centre = [SIDE / 2 + room * (2 * x - 1) for x in (v, w)]
    return torch.stack([centre[0] + RADIUS * angle.cos(), centre[1] + RADIUS * angle.sin()], -1)


def _bouncing(scenes: Scenes, time: Tensor, half: Tensor, speed: Tensor) -> Tensor:
    """Move diagonally and reflect at the edges, at the top or bottom one in every clip."""
    u, v, w = scenes.chance[..., None].unbind(2)
    span, step = SIDE - 2 * half, speed / math.sqrt(2)
    bounce = step * (NUM_FRAMES - 1) * (0.2 + 0.6 * u)
    down = span - bounce + span * (w < 0.5)
    unfolded = torch.stack([2 * span * v + step * time, down + step * time], -1)
    span = span[..., None]
    return half[..., None] + span - (unfolded % (2 * span) - span).abs()


def bar_cover(labels: Labels, centres: Tensor) -> Tensor:
    """Return the share [B, 4, F] of each sprite's box that the bar covers; centres [B, 4, F, 2]."""
    half = values_of(SIZES, labels.size)[..., None] / 2
    across = bar_coordinate(labels, centres)
    overlap = (across + half).clamp(max=BAR_HIGH) - (across - half).clamp(min=BAR_LOW)
    share = (overlap / (2 * half)).clamp(0, 1)
    return share * (labels.bar != 0)[:, None, None] * labels.is_there[..., None]


def bar_coordinate(labels: Labels, centres: Tensor) -> Tensor:
    """Return how far sprites are along the axis that the bar lies across: x or y, [B, 4, F]."""
    is_level = labels.bar == BARS.index("level")
    return torch.where(is_level[:, None, None], centres[..., 1], centres[..., 0])


def pixel_places(device: torch.device | str, side: int = SIDE) -> Tensor:
    """Return x and y of the middle of every pixel, [side, side, 2]."""
    along = torch.arange(side, device=device) + 0.5
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y], dim=-1)


def _draw(images: Tensor, centres: Tensor, extent: Tensor) -> Tensor:
    """Draw each image [B, C, h, w] at centres [B, F, 2], extent [B] wide: [B, C, F, 64, 64]."""
    offset = pixel_places(images.device) - centres[:, :, None, None]
    grid = rearrange(offset / (extent.view(-1, 1, 1, 1, 1) / 2), "b f h w xy -> b (f h) w xy")
    drawn = F.grid_sample(images, grid, align_corners=False)
    return rearrange(drawn, "b c (f h) w -> b c f h w", h=SIDE)


def _bars(device: torch.device) -> Tensor:
    """Return where each kind of bar lies, [3, 64, 64] bool."""
    x, y = pixel_places(device).unbind(-1)
    inside = [(z > BAR_LOW) & (z < BAR_HIGH) for z in (x, y)]
    return torch.stack([torch.zeros_like(inside[0]), *inside])


def shape_masks(device: torch.device | str) -> Tensor:
    """Return each shape as coverage in [0, 1], and nothing for NO_SHAPE: [9, 16, 16]."""
    fine = 4 * _BITMAP
    x, y = (pixel_places(device, fine) / (fine / 2) - 1).unbind(-1)
    radius, widest = x.hypot(y), x.abs().maximum(y.abs())
    heart_x, heart_y = 1.15 * x, 0.15 - 1.2 * y
    drawn = {
        "disc": radius < 0.97,
        "square": widest < 0.86,
        "triangle": (x.abs() < (y + 0.95) / 2) & (y < 0.9),
        "cross": (x.abs().minimum(y.abs()) < 0.32) & (widest < 0.97),
        "ring": (radius < 0.98) & (radius > 0.48),
        "heart": (heart_x**2 + heart_y**2 - 1) ** 3 < heart_x**2 * heart_y**3,
        "arch": ((x.abs() > 0.42) | (y < -0.35)) & (widest < 0.93),
        "hourglass": (x.abs() < 0.15 + 0.8 * y.abs()) & (y.abs() < 0.95),
    }
    masks = torch.stack([*(drawn[name] for name in SHAPES), torch.zeros_like(drawn["disc"])])
    return F.avg_pool2d(masks[:, None].float(), 4)[:, 0]


def encode_frames(frames: Tensor) -> Tensor:
    """Turn frames [B, F, H, W] in [0, 1] into latents [B, 16, F / 4, H / 2, W / 2]."""
    scaled = (frames - FRAME_MEAN) / FRAME_STD
    return rearrange(scaled, "b (f r) (h p) (w q) -> b (r p q) f h w", **_PATCHES)


def decode_latents(latents: Tensor) -> Tensor:
    """Turn latents [B, 16, F, H, W] back into frames [B, 4 F, 2 H, 2 W], clamped to [0, 1]."""
    scaled = rearrange(latents, "b (r p q) f h w -> b (f r) (h p) (w q)", **_PATCHES)
    return (scaled * FRAME_STD + FRAME_MEAN).clamp(0, 1)
