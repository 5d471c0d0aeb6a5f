"""The published Wan models, the videos that they are used for, and what a call of them takes.

Operations are those of matrix products alone, two for each multiply and add, as is the custom for a
share of the peak ("MFU"): norms, rotations and activations are work that it does not see.
"""

import dataclasses
import math

from linvideo_core.kernels.tiles import Size as Grid
from linvideo_core.models.wan import WanConfig

PROMPT_TOKENS = 512
VIDEO_STEPS, GUIDANCE_SCALE = 50, 5.0
FRAME_STRIDE, PIXEL_STRIDE = 4, 8

# LinVideo's published choice for Wan 1.3B and 16 linear layers: 2-8, 10-13, 15, ... from 1.
_PUBLISHED_1B = (*range(1, 8), *range(9, 13), 14, 15, 22, 24, 29)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a video: what one call of the denoiser is asked for.

    layers: the layers that are made linear, counted from 0.
    tiles: a small and a large one for hybrid layers, in tokens as `LinearForm` spells them: about
        0.3 and 2 % of the tokens.
    """

    name: str
    model: str
    resolution: str
    config: WanConfig
    layers: tuple[int, ...]
    num_frames: int
    height: int
    width: int
    shift: float
    prompt_tokens: int = PROMPT_TOKENS
    tiles: tuple[str, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents."""
        frames = (self.num_frames - 1) // FRAME_STRIDE + 1
        sides = (self.height // PIXEL_STRIDE, self.width // PIXEL_STRIDE)
        return (self.config.in_channels, frames, *sides)

    @property
    def grid(self) -> Grid:
        """Frames, height and width in tokens."""
        return self.config.find_grid(self.latent_shape)

    @property
    def tokens(self) -> int:
        """Return the number of video tokens."""
        return math.prod(self.grid)


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Choose layers at even distances, the first one left out: speed depends on their number."""
    return tuple(1 + i * (num_layers - 1) // count for i in range(count))


def _make_sizes() -> dict[str, Size]:
    small = {"model": "Wan 1.3B", "config": WanConfig(), "layers": _PUBLISHED_1B}
    large = {
        "model": "Wan 14B",
        "config": WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
        "layers": spread_layers(40, 22),
    }
    low = {"resolution": "480p", "num_frames": 81, "height": 480, "width": 832, "shift": 3.0}
    low["tiles"] = ("1x10x11", "3x15x14")
    high = {"resolution": "720p", "num_frames": 81, "height": 720, "width": 1280, "shift": 5.0}
    high["tiles"] = ("3x9x8", "7x15x16")
    tiny = Size(
        name="tiny",
        model="tiny Wan",
        resolution="96 x 128",
        # Whatever its width, ComfyUI takes prompts and times to be as wide as those of all Wans.
        config=WanConfig(dim=256, num_heads=2, num_layers=4, ffn_dim=512),
        layers=spread_layers(4, 2),
        num_frames=17,
        height=96,
        width=128,
        shift=3.0,
        prompt_tokens=16,
        tiles=("1x3x4", "2x4x5"),
    )
    found = (
        Size(name="1.3b-480p", **small, **low),
        Size(name="14b-480p", **large, **low),
        Size(name="14b-720p", **large, **high),
        tiny,
    )
    return {size.name: size for size in found}


SIZES = _make_sizes()
"""Name -> size; the tiny one shows on any computer that everything runs."""

# Dense bf16 with fp32 accumulation, TFLOP/s, by the longest of these that a name has.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def find_peak(device_name: str) -> float | None:
    """Return a card's peak of dense bf16 operations a second; none for an unknown device."""
    parts = [part for part in _PEAKS if f" {part} " in f" {device_name} "]
    return 1e12 * _PEAKS[max(parts, key=len)] if parts else None


def count_flops(size: Size, num_linear: int) -> int:
    """Return the operations of one call at batch 1, `num_linear` layers with M = D features."""
    config, L, S = size.config, size.tokens, size.prompt_tokens
    softmax = (config.num_layers - num_linear) * softmax_flops(L, config.dim)
    linear = num_linear * linear_flops(L, config.dim, config.dim // config.num_heads)
    # q, k, v, o of self-attention; q, o and k, v of cross-attention, and itself; feed-forward.
    projections = 6 * 2 * L * config.dim**2 + 2 * 2 * S * config.dim**2
    block = projections + 4 * L * S * config.dim + 4 * L * config.dim * config.ffn_dim
    # Before and behind the blocks.
    patch = math.prod(config.patch_size) * (config.in_channels + config.out_channels)
    ends = 2 * L * patch * config.dim + 2 * S * config.dim * (config.text_dim + config.dim)
    ends += 2 * config.dim * (config.freq_dim + 7 * config.dim)
    return softmax + linear + config.num_layers * block + ends


def softmax_flops(L: int, dim: int) -> int:
    """Return the operations of softmax attention: q k^T and its product with v."""
    return 2 * 2 * L * L * dim


def linear_flops(L: int, dim: int, features: int) -> int:
    """Return the operations of linear attention: two maps [D, M/2], sums over keys, outputs."""
    maps = 2 * 2 * L * dim * features // 2
    return maps + 2 * 2 * L * dim * features
