"""The demo's latent codec: a fixed, exactly invertible rearrangement in place of a video VAE.

Like Wan's VAE it packs four frames into one latent frame; each latent pixel holds 2 x 2 pixels of
them, so its 16 channels see local motion.
"""

from einops import rearrange
from torch import Tensor

from . import FRAME_SIZE, NUM_FRAMES

TIME_PATCH, SPACE_PATCH = 4, 2
LATENT_SHAPE = (
    TIME_PATCH * SPACE_PATCH**2,
    NUM_FRAMES // TIME_PATCH,
    FRAME_SIZE // SPACE_PATCH,
    FRAME_SIZE // SPACE_PATCH,
)
"""C, F, H, W of one clip's latents."""

# Over 16,384 clips that `sample_clips` drew from the training split with seed 0 the pixels have
# mean 0.0298 and standard deviation 0.1329. Latents get a standard deviation of 0.5, not 1: bright
# strokes on black carry so much contrast that, at unit variance, noise hides where a digit is and
# where it goes in the first few sampling steps alone, which trains motion badly.
FRAME_MEAN = 0.0298
FRAME_SCALE = 0.25


_PATCHES = {"r": TIME_PATCH, "p": SPACE_PATCH, "q": SPACE_PATCH}


def encode_frames(frames: Tensor) -> Tensor:
    """Turn frames into latents of about zero mean and a standard deviation of 0.5.

    frames: [B, 28, 32, 32] floating, [0, 1]

    Returns latents: [B, 16, 7, 16, 16], same dtype.
    """
    scaled = (frames - FRAME_MEAN) / FRAME_SCALE
    return rearrange(scaled, "b (f r) (h p) (w q) -> b (r p q) f h w", **_PATCHES)


def decode_latents(latents: Tensor) -> Tensor:
    """Turn latents back into frames, clamped to the range of a picture.

    latents: [B, 16, 7, 16, 16] floating

    Returns frames: [B, 28, 32, 32] in [0, 1], same dtype.
    """
    scaled = rearrange(latents, "b (r p q) f h w -> b (f r) (h p) (w q)", **_PATCHES)
    return (scaled * FRAME_SCALE + FRAME_MEAN).clamp(0, 1)
