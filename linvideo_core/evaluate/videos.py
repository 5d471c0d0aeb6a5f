"""Strips and animations: the same videos by several models, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..run.files import replacing
from .plots import FONTS

_STRIP_FRAME_SIZE = 96
_ANIMATION_SCALE = 3
_FRAME_MILLISECONDS = 100
_FADE_FRAMES = 3
_GAP, _MARGIN = 6, 20
_INK_GREY, _QUIET_GREY, _PAPER_GREY = 34, 118, 255


def save_strip(videos: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Write a PNG: below each caption one labelled row a video, every second frame.

    videos: name -> [B, F, H, W] floating in [0, 1]; B is the number of captions.
    """
    clips = {name: _to_grey(video[:, ::2]) for name, video in _checked(videos, captions).items()}
    _, F, H, W = next(iter(clips.values())).shape
    scale = max(1, round(_STRIP_FRAME_SIZE / max(H, W)))
    label_font, caption_font = _font(15), _font(17, bold=True)
    gutter = max(int(label_font.getlength(name)) for name in clips) + 14
    cell_h, cell_w = H * scale, W * scale
    block = 30 + len(clips) * (cell_h + _GAP) + _MARGIN
    width = 2 * _MARGIN + gutter + F * (cell_w + _GAP) - _GAP
    page = Image.new("L", (width, _MARGIN + len(captions) * block), _PAPER_GREY)
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        top = _MARGIN + i * block
        text = _shorten(caption, caption_font, width - 2 * _MARGIN)
        draw.text((_MARGIN, top), text, _INK_GREY, caption_font)
        for j, (name, clip) in enumerate(clips.items()):
            y = top + 30 + j * (cell_h + _GAP)
            middle = (_MARGIN + gutter - 14, y + cell_h // 2)
            draw.text(middle, name, _QUIET_GREY, label_font, anchor="rm")
            for f in range(F):
                x = _MARGIN + gutter + f * (cell_w + _GAP)
                page.paste(_enlarge(clip[i, f], scale), (x, y))
    _save_image(page, path, "PNG")


def save_animation(videos: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Write a GIF that loops: a labelled column a video, a row a caption.

    The last frame fades into the first, so that the loop neither jumps nor runs backwards, which
    would hide the direction of the motion.

    videos: name -> [B, F, H, W] floating in [0, 1]; B is the number of captions.
    """
    clips = {name: _to_grey(_close_loop(v)) for name, v in _checked(videos, captions).items()}
    _, F, H, W = next(iter(clips.values())).shape
    cell_h, cell_w = H * _ANIMATION_SCALE, W * _ANIMATION_SCALE
    label_font, caption_font = _font(17, bold=True), _font(14)
    labels = max(int(label_font.getlength(name)) for name in clips) + 16
    step = max(cell_w + _GAP, labels)
    width = 2 * _MARGIN + len(clips) * step - _GAP
    row_h = cell_h + 34
    page = Image.new("L", (width, 44 + len(captions) * row_h + _GAP), _PAPER_GREY)
    draw = ImageDraw.Draw(page)
    for j, name in enumerate(clips):
        centre = _MARGIN + j * step + (step - _GAP) // 2
        draw.text((centre, 24), name, _INK_GREY, label_font, anchor="mm")
    for i, caption in enumerate(captions):
        text = _shorten(caption, caption_font, width - 2 * _MARGIN)
        y = 44 + i * row_h + cell_h + 14
        draw.text((width // 2, y), text, _QUIET_GREY, caption_font, anchor="mm")
    frames = []
    for f in range(F):
        frame = page.copy()
        for i in range(len(captions)):
            for j, clip in enumerate(clips.values()):
                x = _MARGIN + j * step + (step - _GAP - cell_w) // 2
                frame.paste(_enlarge(clip[i, f], _ANIMATION_SCALE), (x, 44 + i * row_h))
        frames.append(frame)
    _save_image(
        frames[0], path, "GIF",
        save_all=True, append_images=frames[1:], duration=_FRAME_MILLISECONDS, loop=0,
    )  # fmt: skip


def _checked(videos: Mapping[str, Tensor], captions: Sequence[str]) -> Mapping[str, Tensor]:
    shapes = {tuple(video.shape) for video in videos.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 4 or shape[0] != len(captions):
        raise ValueError(
            f"videos of shapes {sorted(shapes)} and {len(captions)} captions given; videos of one "
            "shape [B, F, H, W] and B captions are needed"
        )
    return videos


def _close_loop(video: Tensor) -> Tensor:
    """Append a short fade from the last frame of [B, F, H, W] to the first."""
    weights = torch.linspace(0, 1, _FADE_FRAMES + 2, device=video.device)[1:-1]
    first, last = video[:, :1].float(), video[:, -1:].float()
    return torch.cat([video.float(), torch.lerp(last, first, weights.view(1, -1, 1, 1))], dim=1)


def _to_grey(video: Tensor) -> np.ndarray:
    finite = video.detach().float().nan_to_num(0.0).clamp(0, 1)
    return finite.mul(255).round().byte().cpu().numpy()


def _enlarge(frame: np.ndarray, scale: int) -> Image.Image:
    H, W = frame.shape
    return Image.fromarray(frame).resize((W * scale, H * scale), Image.Resampling.NEAREST)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a text, with an ellipsis, to what fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    lengths = (n for n in range(len(text), 0, -1) if font.getlength(text[:n] + "…") <= width)
    return text[: next(lengths, 0)].rstrip() + "…"


def _save_image(image: Image.Image, path: Path, kind: str, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **options)
