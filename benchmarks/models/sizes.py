"""The published Wan models and the videos that they are used for, by name."""

import dataclasses

from linvideo_core.models.wan import WanConfig

PROMPT_TOKENS = 512
VIDEO_STEPS, GUIDANCE_SCALE = 50, 5.0
_LATENT_CHANNELS, _FRAME_STRIDE, _PIXEL_STRIDE = 16, 4, 8

# LinVideo's published choice for Wan 1.3B and 16 linear layers, counted from 1.
_PUBLISHED_1B = (*range(2, 9), *range(10, 14), 15, 16, 23, 25, 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a video: what one call of the denoiser is asked for.

    layers: the layers that are made linear, counted from 0.
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

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents."""
        frames = (self.num_frames - 1) // _FRAME_STRIDE + 1
        return (
            self.config.in_channels,
            frames,
            self.height // _PIXEL_STRIDE,
            self.width // _PIXEL_STRIDE,
        )

    @property
    def tokens(self) -> int:
        """Return the number of video tokens."""
        _, frames, height, width = self.latent_shape
        _, patch_height, patch_width = self.config.patch_size
        return frames * (height // patch_height) * (width // patch_width)

    def with_latent_frames(self, frames: int) -> "Size":
        """Return the size of a video with so many latent frames."""
        name = f"{self.name}, {frames} latent frames"
        return dataclasses.replace(self, name=name, num_frames=_FRAME_STRIDE * (frames - 1) + 1)


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Choose layers at even distances, the first one left out: speed depends on their number."""
    return tuple(1 + i * (num_layers - 1) // count for i in range(count))


def _make_sizes() -> dict[str, Size]:
    small = WanConfig()
    large = WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    # Whatever its width, ComfyUI takes prompts and times to be as wide as those of all Wan models.
    tiny = WanConfig(dim=256, num_heads=2, num_layers=4, ffn_dim=512)
    layers = tuple(layer - 1 for layer in _PUBLISHED_1B)
    low = {"resolution": "480p", "num_frames": 81, "height": 480, "width": 832, "shift": 3.0}
    high = {"resolution": "720p", "num_frames": 81, "height": 720, "width": 1280, "shift": 5.0}
    found = (
        Size(name="1.3b-480p", model="Wan 1.3B", config=small, layers=layers, **low),
        Size(name="14b-480p", model="Wan 14B", config=large, layers=spread_layers(40, 22), **low),
        Size(name="14b-720p", model="Wan 14B", config=large, layers=spread_layers(40, 22), **high),
        Size(
            name="tiny",
            model="tiny Wan",
            resolution="96 x 128",
            config=tiny,
            layers=spread_layers(4, 2),
            num_frames=17,
            height=96,
            width=128,
            shift=3.0,
            prompt_tokens=16,
        ),
    )
    return {size.name: size for size in found}


SIZES = _make_sizes()
"""Name -> size; the tiny one shows on any computer that everything runs."""
