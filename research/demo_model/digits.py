"""Clips of a handwritten digit moving in one of eight directions, rendered on any device.

The handwriting is scikit-learn's `load_digits` (1,797 images of 8 x 8), drawn 10 pixels high on a
black canvas of 32. All that is random comes from one `torch.Generator`: a seed gives a clip again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from linvideo_core.demo import DIRECTIONS, FRAME_SIZE, NUM_FRAMES

DIGIT_SIZE = 10
MIN_SPEED, MAX_SPEED = 0.4, 0.68
HELD_OUT_EVERY = 5


class DigitImages(NamedTuple):
    """Handwritten digits: images [N, 8, 8] fp32 in [0, 1], labels [N] int64, 0 to 9."""

    images: Tensor
    labels: Tensor


class DigitClips(NamedTuple):
    """Rendered clips and what they show.

    frames: [B, F, 32, 32] fp32 in [0, 1]
    digits: [B] int64, 0 to 9
    directions: [B] int64, index into `DIRECTIONS`
    """

    frames: Tensor
    digits: Tensor
    directions: Tensor


def load_digit_images(split: str, *, device: torch.device | str = "cpu") -> DigitImages:
    """Load one split of the handwriting: "train" (80 %) or "held-out" (20 %).

    Every fifth image of each digit is held out, so the split needs no random numbers.

    Raises ValueError for another split, ImportError when scikit-learn is missing.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f'split is "train" or "held-out", not {split!r}.')
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The handwritten digits come from scikit-learn: pip install scikit-learn."
        ) from error
    source = load_digits()
    images = torch.from_numpy(source.images).float() / 16
    labels = torch.from_numpy(source.target).long()
    is_held_out = torch.zeros_like(labels, dtype=torch.bool)
    for digit in range(10):
        is_held_out[(labels == digit).nonzero().flatten()[::HELD_OUT_EVERY]] = True
    chosen = is_held_out if split == "held-out" else ~is_held_out
    return DigitImages(images[chosen].to(device), labels[chosen].to(device))


def sample_clips(
    source: DigitImages,
    batch_size: int,
    *,
    generator: torch.Generator,
    pose: Tensor | None = None,
) -> DigitClips:
    """Draw clips: any image, any direction, any speed, any start that stays inside the canvas.

    generator: on the device of `source`; it alone decides the result
    pose: [B, 2, 2] fp32, passed on to `render_clips`
    """
    device = source.images.device
    index = torch.randint(len(source.labels), (batch_size,), generator=generator, device=device)
    directions = torch.randint(len(DIRECTIONS), (batch_size,), generator=generator, device=device)
    chance = torch.rand(batch_size, 3, generator=generator, device=device)
    units = torch.tensor(list(DIRECTIONS.values()), device=device)
    speed = MIN_SPEED + (MAX_SPEED - MIN_SPEED) * chance[:, :1]
    step = units[directions] * speed
    # Interpolation spreads a digit by one pixel around its box.
    margin = DIGIT_SIZE / 2 + 1
    travel = step * (NUM_FRAMES - 1)
    lowest = margin - travel.clamp(max=0)
    highest = FRAME_SIZE - margin - travel.clamp(min=0)
    start = lowest + (highest - lowest) * chance[:, 1:]
    frames = render_clips(source.images[index], start, step, pose=pose)
    return DigitClips(frames, source.labels[index], directions)


def render_clips(
    images: Tensor, start: Tensor, step: Tensor, *, pose: Tensor | None = None
) -> Tensor:
    """Draw each image along a straight line with bilinear interpolation, at sub-pixel places.

    images: [B, 8, 8] fp32 in [0, 1]
    start: [B, 2] fp32, centre (x, y) of the digit in the first frame, pixels
    step: [B, 2] fp32, pixels per frame
    pose: [B, 2, 2] fp32, optional; maps canvas offsets to image offsets (turn, zoom, slant)

    Returns [B, F, 32, 32] fp32 in [0, 1].
    """
    B, _, _ = images.shape
    time = torch.arange(NUM_FRAMES, device=images.device, dtype=images.dtype)
    centre = start[:, None] + time[None, :, None] * step[:, None]
    # grid_sample measures places in half widths from the middle, of the canvas and of the image.
    shift = (FRAME_SIZE / 2 - centre) / (DIGIT_SIZE / 2)
    turn = torch.eye(2, device=images.device).expand(B, 2, 2) if pose is None else pose
    turn = turn[:, None].expand(B, NUM_FRAMES, 2, 2)
    matrix = torch.cat([turn * (FRAME_SIZE / DIGIT_SIZE), turn @ shift[..., None]], dim=-1)
    grid = F.affine_grid(
        matrix.flatten(0, 1), [B * NUM_FRAMES, 1, FRAME_SIZE, FRAME_SIZE], align_corners=False
    )
    grid = rearrange(grid, "(b f) h w xy -> b (f h) w xy", b=B)
    drawn = F.grid_sample(images[:, None], grid, padding_mode="zeros", align_corners=False)
    return rearrange(drawn, "b 1 (f h) w -> b f h w", f=NUM_FRAMES)


def augment_clips(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil clips as a generator might: blur, gain, gamma, flicker, grain and blotches.

    frames: [B, F, 32, 32] fp32, [0, 1]

    Returns [B, F, 32, 32] in [0, 1].
    """
    B, num_frames, height, width = frames.shape

    def uniform(low: float, high: float, *size: int) -> Tensor:
        draw = torch.rand(B, *size, 1, 1, 1, generator=generator, device=frames.device)
        return low + (high - low) * draw.view(B, -1, 1, 1)

    def grain(size: int) -> Tensor:
        return torch.randn(B, num_frames, size, size, generator=generator, device=frames.device)

    blurred = F.avg_pool2d(frames, 3, stride=1, padding=1)
    frames = frames.lerp(blurred, uniform(-0.5, 1.0).clamp(min=0))
    frames = frames.clamp(min=1e-4) ** uniform(0.7, 1.4) * uniform(0.7, 1.2)
    frames = frames * uniform(0.9, 1.1, num_frames)
    blotches = F.interpolate(grain(height // 4), size=(height, width), mode="bilinear")
    frames = frames + grain(height) * uniform(-0.05, 0.12).clamp(min=0)
    return (frames + blotches * uniform(-0.05, 0.08).clamp(min=0)).clamp(0, 1)


def draw_poses(batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw small turns (12 degrees), zooms and slants [B, 2, 2] for `render_clips`."""
    draw = torch.rand(4, batch_size, generator=generator, device=generator.device) * 2 - 1
    angle, zoom, slant = draw[0] * 0.2, 1 + draw[1] * 0.12, draw[2] * 0.15
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([cos, slant - sin, sin, cos], dim=-1).view(batch_size, 2, 2)
