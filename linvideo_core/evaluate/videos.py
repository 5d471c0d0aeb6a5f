"""Pictures and videos of samples: the same videos by several models, side by side; MP4 files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..run.files import replacing
from .metrics import to_bytes
from .plots import FONTS

_STRIP_FRAME_SIZE, _MAX_STRIP_FRAMES = 96, 14
# Of frames that are shown enlarged the longer side is smaller.
_SMALL, _ANIMATION_SCALE = 200, 3
_FADE_FRAMES = 3
_GAP, _MARGIN = 6, 20
_INK, _QUIET, _PAPER = "#222222", "#767676", "#ffffff"
_QUALITY = 8  # Of 10, in imageio-ffmpeg's words.


def save_strip(videos: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Write a PNG: below each caption one labelled row a video, every second frame or fewer.

    videos: name -> [B, F, H, W], in colour [B, F, H, W, 3], uint8 or floating in [0, 1]; B is the
        number of captions.
    """
    clips = _checked(videos, captions)
    F, H, W = next(iter(clips.values())).shape[1:4]
    every = max(2, -(-F // _MAX_STRIP_FRAMES))
    clips = {name: clip[:, ::every] for name, clip in clips.items()}
    scale = _STRIP_FRAME_SIZE / max(H, W)
    scale = max(1, round(scale)) if max(H, W) < _SMALL else 2 * scale
    label_font, caption_font = _font(15), _font(17, bold=True)
    gutter = max(int(label_font.getlength(name)) for name in clips) + 14
    cell_h, cell_w = round(H * scale), round(W * scale)
    block = 30 + len(clips) * (cell_h + _GAP) + _MARGIN
    width = 2 * _MARGIN + gutter + -(-F // every) * (cell_w + _GAP) - _GAP
    page = _new_page(width, _MARGIN + len(captions) * block, clips)
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        top = _MARGIN + i * block
        text = _shorten(caption, caption_font, width - 2 * _MARGIN)
        draw.text((_MARGIN, top), text, _INK, caption_font)
        for j, (name, clip) in enumerate(clips.items()):
            y = top + 30 + j * (cell_h + _GAP)
            middle = (_MARGIN + gutter - 14, y + cell_h // 2)
            draw.text(middle, name, _QUIET, label_font, anchor="rm")
            for f, frame in enumerate(clip[i]):
                x = _MARGIN + gutter + f * (cell_w + _GAP)
                page.paste(_resize(frame, cell_w, cell_h), (x, y))
    _save_image(page, path, "PNG")


def save_animation(
    videos: Mapping[str, Tensor],
    captions: Sequence[str],
    path: Path,
    *,
    fps: int = 10,
) -> None:
    """Write a GIF that loops, or an MP4: a labelled column a video, a row a caption.

    A GIF's last frame fades into the first, so that the loop neither jumps nor runs backwards,
    which would hide the direction of the motion.

    videos: as for `save_strip`. fps: frames a second.
    """
    clips = _checked(videos, captions)
    if path.suffix == ".mp4":
        save_video((np.asarray(page) for page in _draw_pages(clips, captions)), path, fps)
        return
    pages = _draw_pages({name: _close_loop(clip) for name, clip in clips.items()}, captions)
    _save_image(
        next(pages), path, "GIF",
        save_all=True, append_images=pages, duration=1000 // fps, loop=0,
    )  # fmt: skip


def save_video(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Write an MP4 (H.264) of frames [H, W] or [H, W, 3] in uint8, H and W even.

    Needs imageio-ffmpeg, see `autoencoder.check_packages`.
    """
    import imageio_ffmpeg

    frames = iter(frames)
    first = next(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (first.shape[1], first.shape[0]),
            pix_fmt_in="gray" if first.ndim == 2 else "rgb24",
            fps=fps,
            quality=_QUALITY,
            codec="libx264",
            macro_block_size=2,
            # The temporary name has no ending that tells.
            output_params=["-f", "mp4"],
        )
        writer.send(None)
        for frame in (first, *frames):
            writer.send(np.ascontiguousarray(frame))
        writer.close()


def _draw_pages(clips: Mapping[str, Tensor], captions: Sequence[str]) -> Iterator[Image.Image]:
    """Yield a page a frame; sides are even, as video codecs want them."""
    F, H, W = next(iter(clips.values())).shape[1:4]
    scale = _ANIMATION_SCALE if max(H, W) < _SMALL else 1
    cell_h, cell_w = H * scale, W * scale
    label_font, caption_font = _font(17, bold=True), _font(14)
    labels = max(int(label_font.getlength(name)) for name in clips) + 16
    step = max(cell_w + _GAP, labels)
    width = 2 * _MARGIN + len(clips) * step - _GAP
    row_h = cell_h + 34
    height = 44 + len(captions) * row_h + _GAP
    page = _new_page(width + width % 2, height + height % 2, clips)
    draw = ImageDraw.Draw(page)
    for j, name in enumerate(clips):
        centre = _MARGIN + j * step + (step - _GAP) // 2
        draw.text((centre, 24), name, _INK, label_font, anchor="mm")
    for i, caption in enumerate(captions):
        text = _shorten(caption, caption_font, width - 2 * _MARGIN)
        y = 44 + i * row_h + cell_h + 14
        draw.text((width // 2, y), text, _QUIET, caption_font, anchor="mm")
    for f in range(F):
        frame = page.copy()
        for i in range(len(captions)):
            for j, clip in enumerate(clips.values()):
                x = _MARGIN + j * step + (step - _GAP - cell_w) // 2
                frame.paste(_resize(clip[i, f], cell_w, cell_h), (x, 44 + i * row_h))
        yield frame


def _checked(videos: Mapping[str, Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
    """Return the videos in uint8 on the CPU."""
    shapes = {tuple(video.shape) for video in videos.values()}
    shape = next(iter(shapes), ())
    is_clip = len(shape) == 4 or (len(shape) == 5 and shape[4] == 3)
    if len(shapes) != 1 or not is_clip or shape[0] != len(captions):
        raise ValueError(
            f"videos of shapes {sorted(shapes)} and {len(captions)} captions given; videos of one "
            "shape [B, F, H, W] or [B, F, H, W, 3] and B captions are needed"
        )
    return {name: to_bytes(video).cpu() for name, video in videos.items()}


def _close_loop(video: Tensor) -> Tensor:
    """Append a short fade from the last frame of [B, F, H, W] or [B, F, H, W, 3] to the first."""
    weights = torch.linspace(0, 1, _FADE_FRAMES + 2)[1:-1].view(1, -1, *[1] * (video.ndim - 2))
    first, last = video[:, :1].float(), video[:, -1:].float()
    return torch.cat([video, torch.lerp(last, first, weights).round().byte()], dim=1)


def _new_page(width: int, height: int, clips: Mapping[str, Tensor]) -> Image.Image:
    is_colour = next(iter(clips.values())).ndim == 5
    return Image.new("RGB" if is_colour else "L", (width, height), _PAPER)


def _resize(frame: Tensor, width: int, height: int) -> Image.Image:
    image = Image.fromarray(frame.numpy())
    is_larger = width >= image.width
    method = Image.Resampling.NEAREST if is_larger else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


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
