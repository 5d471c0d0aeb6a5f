"""A picture of a transfer in progress, for a node a few hundred pixels wide."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _GAP = 560, 14, 6
_TITLE_SIZE, _LABEL_SIZE = 21, 17
_PLOT_HEIGHT, _MAX_FRAME_HEIGHT = 150, 240
_INK, _QUIET, _PAPER = (34, 34, 34), (118, 118, 118), (255, 255, 255)
_LINEAR, _SOFTMAX = (0, 114, 178), (213, 94, 0)


def draw_preview(
    rows: Sequence[Mapping[str, Any]],
    videos: Mapping[str, Sequence[Image.Image]],
    *,
    title: str,
    num_steps: int,
    kind: str = "linear",
) -> Image.Image:
    """Return the picture, RGB: a labelled row of frames a video, below them the layers' curves.

    rows: from metrics.jsonl; those with `layer_scores` are drawn, over `num_steps` steps.
    videos: name -> a few frames of one size. kind: what layers become, of `LinearForm`.
    """
    strips = {name: _fit(frames) for name, frames in videos.items() if frames}
    heights = [_LABEL_SIZE + strip[0].height + 3 * _GAP for strip in strips.values()]
    scores = [row for row in rows if row.get("layer_scores")]
    plot_height = _PLOT_HEIGHT + 2 * _LABEL_SIZE + _GAP if scores else 0
    top = _MARGIN + _TITLE_SIZE + 2 * _GAP
    page = Image.new("RGB", (_WIDTH, top + sum(heights) + plot_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, _INK, ImageFont.load_default(_TITLE_SIZE))
    for (name, frames), height in zip(strips.items(), heights, strict=True):
        draw.text((_MARGIN, top), name, _QUIET, ImageFont.load_default(_LABEL_SIZE))
        for number, frame in enumerate(frames):
            left = _MARGIN + number * (frame.width + _GAP)
            page.paste(frame, (left, top + _LABEL_SIZE + _GAP))
        top += height
    if scores:
        _draw_scores(draw, scores, num_steps, top, kind)
    return page


def _draw_scores(
    draw: ImageDraw.ImageDraw, rows: list[Mapping[str, Any]], num_steps: int, top: int, kind: str
) -> None:
    left, right = _MARGIN, _WIDTH - _MARGIN
    font = ImageFont.load_default(_LABEL_SIZE)
    draw.text((left, top), "how each layer is chosen, step by step", _QUIET, font)
    top += _LABEL_SIZE + _GAP
    bottom = top + _PLOT_HEIGHT
    for y, offset, label, anchor in ((top, 2, "softmax", "rt"), (bottom, -2, kind, "rd")):
        draw.line((left, y, right, y), (225, 225, 225))
        draw.text((right, y + offset), label, _QUIET, font, anchor=anchor)
    if len(rows) < 2:
        return
    for layer, last in enumerate(rows[-1]["layer_scores"]):
        x = [left + (right - left) * row["step"] / max(1, num_steps - 1) for row in rows]
        y = [bottom - _PLOT_HEIGHT * row["layer_scores"][layer] for row in rows]
        draw.line(list(zip(x, y, strict=True)), _LINEAR if last < 0.5 else _SOFTMAX, 2)


def _fit(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Return frames of one size, as large as lie side by side on the page."""
    width = (_WIDTH - 2 * _MARGIN - (len(frames) - 1) * _GAP) // len(frames)
    scale = min(width / frames[0].width, _MAX_FRAME_HEIGHT / frames[0].height)
    size = tuple(max(1, round(scale * side)) for side in frames[0].size)
    method = Image.Resampling.NEAREST if frames[0].height < 60 else Image.Resampling.BILINEAR
    return [frame.convert("RGB").resize(size, method) for frame in frames]
