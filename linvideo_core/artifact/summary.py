"""What an artifact says of itself, in words and as a picture, and how a sampling differs from it.

The picture is drawn in the font that Pillow carries, so nothing but Pillow is needed.
"""

import dataclasses
import math
import statistics
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..flow import make_sigmas
from .header import Artifact, ArtifactHeader, Usage

_MAX_TEXT, _MAX_ORIGIN = 400, 80
# Noise levels that count as the same. Two experts' schedules are cut between two steps, not at the
# boundary itself, so at a range's ends more is allowed.
_NEAR_LEVEL, _NEAR_RANGE = 2e-3, 0.03
# As many times fewer steps than a file was made in are too few without distillation.
_FEW = 4

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
_DRAWN = ("model", "linear layers", "hybrid layers", "size")


def title(header: ArtifactHeader) -> str:
    """Say how many of the model's layers are linear, or hybrid."""
    count, total = len(header.linear_layers), header.num_layers
    return f"{count} of {total} layers {'is' if count == 1 else 'are'} {header.form.kind}"


def describe(artifact: Artifact) -> dict[str, str]:
    """Return what an artifact says of itself: name -> printable text, in order."""
    header = artifact.header
    weights = _printable(str(header.provenance.get("model", "not named")), _MAX_ORIGIN)
    origin = (f"{name} {value}" for name, value in header.provenance.items() if name != "model")
    facts = {
        "model": header.fingerprint,
        "weights": f"{weights} (digest {header.weights_digest})",
        f"{header.form.kind} layers": ", ".join(map(str, header.linear_layers)),
        "trained": f"{header.objective}, {_count(header.steps, 'step')}",
        "feature maps": _describe_maps(header),
        "weight changes": _describe_changes(artifact),
        "size": ", ".join(f"{name} {show_bytes(n)}" for name, n in count_bytes(artifact).items()),
        "video": describe_size(header.usage),
        "sampling": _describe_sampling(header),
        "made with": ", ".join(_printable(text, _MAX_ORIGIN) for text in origin) or "not said",
    }
    return {name: _printable(text, _MAX_TEXT) for name, text in facts.items()}


def describe_size(usage: Usage) -> str:
    """Say at which sizes of video a file was made."""
    found = []
    for width, height, num_frames in usage.sizes:
        frames = f"{num_frames} frames" if num_frames else ""
        size = f"{width} x {height}" if width and height else ""
        found.append(", ".join(filter(None, (size, frames))))
    return " or ".join(filter(None, found)) or "not said"


def count_bytes(artifact: Artifact) -> dict[str, int]:
    """Return the bytes of an artifact's tensors: those of linear attention, and weight changes."""
    low_rank = (factor for pair in artifact.low_rank.values() for factor in pair)
    linear = (tensor for tensors in artifact.linear.values() for tensor in tensors.values())
    return {
        "feature maps": sum(tensor.nbytes for tensor in linear),
        "weight changes": sum(tensor.nbytes for tensor in [*artifact.deltas.values(), *low_rank]),
    }


def show_bytes(count: int) -> str:
    """Show a number of bytes in the largest unit that leaves a whole figure."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _describe_sampling(header: ArtifactHeader) -> str:
    """Say what a file is bound to, then what it was made at."""
    bound, usage = "any number of steps", header.usage
    if header.sigmas:
        grid = ", ".join(f"{sigma:.4g}" for sigma in header.sigmas)
        bound = f"{_count(len(header.sigmas) - 1, 'step')}: sigmas {grid}"
    steps = "" if header.sigmas or usage.steps is None else _count(usage.steps, "step")
    made = [" of ".join(filter(None, (steps, usage.sampler)))]
    if usage.guidance_scale is not None:
        made.append(f"guidance {usage.guidance_scale:g}")
    if usage.shift is not None:
        made.append(f"shift {usage.shift:g}")
    if usage.sigma_from is not None:
        made.append(f"noise levels from {usage.sigma_from:g} to {usage.sigma_to:g}")
    said = ", ".join(filter(None, made))
    return f"{bound}; made at {said}" if said else bound


def _describe_maps(header: ArtifactHeader) -> str:
    parts = [header.feature_map, f"{header.feature_dim} features a head"]
    if header.map_sharing == "shared":
        parts.append("one map for all heads")
    if header.output_gate:
        parts.append("an output gate")
    if header.window:
        parts.append(f"a local softmax over {_count(header.window, 'token')}")
    if header.tile:
        size = " x ".join("all" if n == 0 else str(n) for n in header.form.tile_size)
        parts.append(f"softmax within tiles of {size} tokens, weighed by {header.attention_mass}")
    return ", ".join(parts)


def _describe_changes(artifact: Artifact) -> str:
    if artifact.low_rank:
        weights = _count(len(artifact.low_rank), "weight")
        return f"LoRA of rank {artifact.header.lora_rank} on {weights}"
    if artifact.deltas:
        return f"{_count(len(artifact.deltas), 'weight')} changed as a whole"
    return "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _printable(text: str, max_length: int) -> str:
    """Make one printable line of any text, cut to a length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= max_length else line[: max_length - 1] + "…"


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """How long the attention layers of one kind took in one call of a model.

    kernel: what computes their attention.
    milliseconds: of each layer that was measured, its projections included.
    """

    kernel: str
    milliseconds: Sequence[float]

    @property
    def median(self) -> float:
        """Of the milliseconds; 0 where none were measured."""
        return statistics.median(self.milliseconds or [0.0])

    def __str__(self) -> str:
        return f"{self.median:.{1 if self.median >= 10 else 2}f} ms ({self.kernel})"


def describe_times(
    tokens_shape: Sequence[int], linear: LayerTimes, softmax: LayerTimes, *, kind: str = "linear"
) -> list[str]:
    """Say how long a linear and a softmax layer take, and if nothing is gained.

    tokens_shape: (L,) or (B, L) of the call that was measured; kind: of `LinearForm`.
    softmax: passed over where none were measured, such as where another node computes them.
    """
    tokens = " x ".join(f"{size:,}" for size in tokens_shape)
    kept = f", a softmax layer {softmax}," if softmax.milliseconds else ""
    lines = [f"a {kind} layer takes {linear}{kept} at {tokens} tokens"]
    if softmax.milliseconds and linear.median >= softmax.median:
        lines.append(f"{kind} layers gain nothing at so few tokens, but in longer or larger videos")
    return lines


def find_differences(
    header: ArtifactHeader, sampled: Usage, sigmas: Sequence[float] = ()
) -> list[str]:
    """Say how a sampling differs from how a file wants to be used, one short sentence each.

    sampled: how its model is sampled, as far as that is known; a guidance of 1 is none.
    sigmas: noise levels of this sampling, or of a part of one; each but the last is a step.

    What the file does not say, and what is not known of the sampling, is passed over.
    """
    usage = header.usage
    return [
        *_compare_size(usage, sampled),
        *_compare_settings(usage, sampled),
        *_compare_levels(header, sampled.sampler, sigmas),
        *_compare_steps(header, sigmas),
        *_compare_range(usage, sigmas),
    ]


def _compare_size(usage: Usage, sampled: Usage) -> Iterator[str]:
    found = sampled.sizes[0]
    if not any(all(map(_is_same, made, found)) for made in usage.sizes):
        yield f"{describe_size(sampled)}, but the file was made at {describe_size(usage)}"


def _compare_settings(usage: Usage, sampled: Usage) -> Iterator[str]:
    made, found = usage.guidance_scale, sampled.guidance_scale
    if _is_like(made, found):
        pass
    elif made == 1:
        yield f"cfg {found:g}, but guidance is trained into the file: set cfg to 1"
    elif found == 1:
        yield f"no guidance (cfg 1), but the file was made at cfg {made:g}"
    else:
        yield f"cfg {found:g}, but the file was made at {made:g}"
    if not _is_like(usage.shift, sampled.shift):
        yield f"shift {sampled.shift:g}, but the file was made at {usage.shift:g}"


def _compare_levels(
    header: ArtifactHeader, sampler: str | None, sigmas: Sequence[float]
) -> Iterator[str]:
    """Compare with the few levels and the sampler that a distilled file is bound to."""
    if not header.sigmas:
        return
    if any(min(abs(level - s) for level in header.sigmas) > _NEAR_LEVEL for s in sigmas):
        yield (
            f"other noise levels than the {len(header.sigmas) - 1} steps that the file was "
            "distilled for: LinVideo Few-Step Sampler has them"
        )
    made = header.usage.sampler
    if made is not None and sampler is not None and made != sampler:
        yield f"sampler {sampler}, but the file was distilled for {made}"


def _compare_steps(header: ArtifactHeader, sigmas: Sequence[float]) -> Iterator[str]:
    """Find a file that was not distilled sampled in few steps."""
    usage, steps = header.usage, len(sigmas) - 1
    if header.sigmas or usage.steps is None or usage.shift is None or steps < 1:
        return
    grid = make_sigmas(usage.steps, usage.shift)[:-1]
    made = int(((grid > sigmas[-1]) & (grid <= sigmas[0] + _NEAR_LEVEL)).sum())
    if _FEW * steps <= made:
        yield f"{steps} steps, but the file was made in {made} and not distilled for few"


def _compare_range(usage: Usage, sigmas: Sequence[float]) -> Iterator[str]:
    if usage.sigma_from is None or usage.sigma_to is None:
        return
    low, high = usage.sigma_to - _NEAR_RANGE, usage.sigma_from + _NEAR_RANGE
    if outside := sum(not low <= sigma <= high for sigma in sigmas[:-1]):
        yield (
            f"{outside} of {len(sigmas) - 1} steps at noise levels that the file was not made "
            f"for: its own go from {usage.sigma_from:g} to {usage.sigma_to:g}"
        )


def _is_same(made: int | None, found: int | None) -> bool:
    return made is None or found is None or made == found


def _is_like(made: float | None, found: float | None) -> bool:
    return made is None or found is None or math.isclose(made, found, rel_tol=0.01)


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
    chosen = f"{artifact.header.form.kind} attention"
    _draw_legend(page, ((BLUE, chosen), (_SOFT, "softmax attention")))


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
