"""One picture of a training in progress: the layer scores so far beside samples of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .report import find_font

_MARGIN, _GAP = 14, 6
_PLOT_SIZE = (300, 200)
_FRAME_HEIGHT = 92
_INK, _QUIET, _PAPER = (34, 34, 34), (118, 118, 118), (255, 255, 255)
_LINEAR, _SOFTMAX = (0, 114, 178), (213, 94, 0)


def draw_preview(
    rows: Sequence[Mapping[str, Any]],
    videos: Mapping[str, Sequence[Image.Image]],
    *,
    title: str,
    num_steps: int,
) -> Image.Image:
    """Return the picture, RGB: curves on the left, a labelled row of frames a video on the right.

    rows: from metrics.jsonl; those with `layer_scores` are drawn, over `num_steps` steps.
    videos: name -> a few frames of one size.
    """
    width = _PLOT_SIZE[0] + 2 * _MARGIN
    strips = {name: [_enlarge(frame) for frame in frames] for name, frames in videos.items()}
    row_width = max((sum(f.width + _GAP for f in row) for row in strips.values()), default=0)
    page = Image.new("RGB", (width + row_width + _MARGIN, _PLOT_SIZE[1] + 60), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 8), title, _INK, _font(14))
    _draw_scores(draw, [row for row in rows if row.get("layer_scores")], num_steps)
    y = 32
    for name, frames in strips.items():
        x = width
        draw.text((x, y - 2), name, _QUIET, _font(12))
        for frame in frames:
            page.paste(frame, (x, y + 14))
            x += frame.width + _GAP
        y += _FRAME_HEIGHT + 22
    return page


def _draw_scores(draw: ImageDraw.ImageDraw, rows: list[Mapping[str, Any]], num_steps: int) -> None:
    left, top = _MARGIN, 36
    right, bottom = left + _PLOT_SIZE[0], top + _PLOT_SIZE[1] - 18
    for share, label in ((0.0, "softmax"), (1.0, "linear")):
        y = top + share * (bottom - top)
        draw.line((left, y, right, y), (225, 225, 225))
        anchor = "rd" if share else "rt"
        draw.text((right, y + (-2 if share else 2)), label, _QUIET, _font(11), anchor=anchor)
    draw.text((left, bottom + 3), "how each layer is chosen, step by step", _QUIET, _font(11))
    if len(rows) < 2:
        return
    for layer, last in enumerate(rows[-1]["layer_scores"]):
        points = [
            (
                left + (right - left) * row["step"] / max(1, num_steps - 1),
                bottom - (bottom - top) * row["layer_scores"][layer],
            )
            for row in rows
        ]
        draw.line(points, _LINEAR if last < 0.5 else _SOFTMAX, 2)


def _enlarge(frame: Image.Image) -> Image.Image:
    width = max(1, round(frame.width * _FRAME_HEIGHT / frame.height))
    is_tiny = frame.height < _FRAME_HEIGHT
    method = Image.Resampling.NEAREST if is_tiny else Image.Resampling.BILINEAR
    return frame.convert("RGB").resize((width, _FRAME_HEIGHT), method)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(find_font()), size)
