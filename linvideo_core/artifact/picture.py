"""A picture of a LINVIDEO file: its layers, sizes, training and origin, readable when it is small.

It is drawn in the font that Pillow carries, so nothing but Pillow is needed.
"""

import textwrap
import unicodedata
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from .header import Artifact
from .summary import count_bytes, describe, show_bytes, title

INK, QUIET, PAPER = "#222222", "#767676", "#ffffff"
BLUE, VERMILION = "#0072B2", "#D55E00"
_WIDTH, _MARGIN = 1024, 44
_INNER = _WIDTH - 2 * _MARGIN
_VALUES_AT = _MARGIN + 236
_MAX_CELLS, _CELL_HEIGHT, _GAP = 20, 58, 6
_LINE = 38
_MAX_LINES = 6
_SOFT, _RULE = "#eceff1", "#d5d9dc"
# Title, strip and bar show these already.
_DRAWN = ("model", "linear layers", "size")


class _Page:
    """A page that grows downwards as things are drawn on it."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (_WIDTH, 4 * _MARGIN), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = _MARGIN

    def reserve(self, height: int) -> int:
        """Make room for `height` pixels more and return where they start."""
        top, self.y = self.y, self.y + height
        if self.y + _MARGIN > self.image.height:
            grown = Image.new("RGB", (_WIDTH, 2 * (self.y + _MARGIN)), PAPER)
            grown.paste(self.image, (0, 0))
            self.image, self.draw = grown, ImageDraw.Draw(grown)
        return top

    def write(self, text: str, size: int, colour: str, *, bold: bool = False) -> None:
        """Write a text over the page's whole width, cut to a few lines."""
        font = ImageFont.load_default(size)
        for line in _wrap(text, font, _INNER):
            top = self.reserve(round(1.35 * size))
            # Pillow's font has no bold face: a stroke around the letters makes one.
            self.draw.text((_MARGIN, top), line, colour, font, stroke_width=int(bold))

    def finish(self) -> Image.Image:
        """Return the page, cut where it ends."""
        return self.image.crop((0, 0, _WIDTH, self.y + _MARGIN))


def draw_summary(artifact: Artifact, *, note: str = "") -> Image.Image:
    """Draw an artifact as a picture [H, 1024] in RGB; its height follows from what it says.

    note: lines at the foot, such as what the artifact was applied to.
    """
    facts = describe(artifact)
    page = _Page()
    page.write(title(artifact.header), 48, INK, bold=True)
    page.write(artifact.header.fingerprint, 28, QUIET)
    page.reserve(22)
    _draw_layers(page, artifact)
    _draw_sizes(page, artifact)
    page.draw.line((_MARGIN, page.y, _WIDTH - _MARGIN, page.y), _RULE, 2)
    page.reserve(22)
    for name, text in facts.items():
        if name not in _DRAWN:
            _draw_fact(page, name, text)
    for line in note.splitlines():
        page.reserve(18)
        page.write(line, 28, BLUE)
    return page.finish()


def _draw_layers(page: _Page, artifact: Artifact) -> None:
    """Draw a box for each layer, in rows of equal length: numbered and filled where linear."""
    total, linear = artifact.header.num_layers, set(artifact.header.linear_layers)
    num_rows = -(-total // _MAX_CELLS)
    per_row = -(-total // num_rows)
    step = min((_INNER + _GAP) / per_row, 2 * _CELL_HEIGHT)
    font = ImageFont.load_default(22 if total > 100 else 26)
    for start in range(0, total, per_row):
        top = page.reserve(_CELL_HEIGHT + 10)
        for layer in range(start, min(start + per_row, total)):
            left = _MARGIN + (layer - start) * step
            box = (left, top, left + step - _GAP, top + _CELL_HEIGHT)
            is_linear = layer in linear
            page.draw.rounded_rectangle(box, 5, BLUE if is_linear else _SOFT)
            middle = (left + (step - _GAP) / 2, top + _CELL_HEIGHT / 2)
            colour = PAPER if is_linear else QUIET
            page.draw.text(middle, str(layer), colour, font, anchor="mm")
    _draw_legend(page, ((BLUE, "linear attention"), (_SOFT, "softmax attention")))


def _draw_sizes(page: _Page, artifact: Artifact) -> None:
    """Draw a bar of the file's bytes, split into feature maps and weight changes."""
    sizes = count_bytes(artifact)
    total = sum(sizes.values())
    top, left = page.reserve(26), float(_MARGIN)
    colours = (VERMILION, INK)
    for size, colour in zip(sizes.values(), colours, strict=True):
        width = _INNER * size / total
        if size:
            page.draw.rectangle((left, top, left + max(width, 3), top + 16), colour)
        left += width
    texts = (f"{name} {show_bytes(size)}" for name, size in sizes.items())
    _draw_legend(page, tuple(zip(colours, texts, strict=True)))


def _draw_legend(page: _Page, entries: tuple[tuple[str, str], ...]) -> None:
    font, left = ImageFont.load_default(24), _MARGIN
    top = page.reserve(58)
    for colour, text in entries:
        page.draw.rounded_rectangle((left, top + 5, left + 20, top + 25), 4, colour)
        page.draw.text((left + 32, top + 15), text, INK, font, anchor="lm")
        left += 32 + round(font.getlength(text)) + 40


def _draw_fact(page: _Page, name: str, text: str) -> None:
    font = ImageFont.load_default(26)
    label = next(_wrap(name, font, _VALUES_AT - _MARGIN - 16, max_lines=1))
    for i, line in enumerate(_wrap(text, font, _WIDTH - _MARGIN - _VALUES_AT)):
        top = page.reserve(_LINE)
        if i == 0:
            page.draw.text((_MARGIN, top), label, QUIET, font)
        page.draw.text((_VALUES_AT, top), line, INK, font)


def _wrap(
    text: str, font: ImageFont.FreeTypeFont, width: int, *, max_lines: int = _MAX_LINES
) -> Iterator[str]:
    """Yield the lines of a text that fit into `width` pixels; the last ends in … if it is cut.

    Accents are taken away: the font has plain letters.
    """
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    per_line = max(1, int(width * len(text) / max(font.getlength(text), 1)))
    while True:
        lines = textwrap.wrap(text, per_line, max_lines=max_lines, placeholder=" …") or [""]
        if per_line == 1 or all(font.getlength(line) <= width for line in lines):
            break
        per_line -= 1
    yield from lines
