"""The demo's latent codec: a fixed, exactly invertible space-to-depth in place of a video VAE."""

from einops import rearrange
from torch import Tensor

from .digits import FRAME_SIZE, NUM_FRAMES

PATCH = 4
LATENT_SHAPE = (PATCH * PATCH, NUM_FRAMES, FRAME_SIZE // PATCH, FRAME_SIZE // PATCH)
"""C, F, H, W of one clip's latents."""

# Mean and standard deviation of all pixels over 16,384 clips that `sample_clips` drew from the
# training split with seed 0.
FRAME_MEAN = 0.0339
FRAME_STD = 0.1412


def encode_frames(frames: Tensor) -> Tensor:
    """Turn frames into latents of about zero mean and unit variance.

    frames: [B, F, 48, 48] floating, [0, 1]

    Returns latents: [B, 16, F, 12, 12], same dtype.
    """
    scaled = (frames - FRAME_MEAN) / FRAME_STD
    return rearrange(scaled, "b f (h p) (w q) -> b (p q) f h w", p=PATCH, q=PATCH)


def decode_latents(latents: Tensor) -> Tensor:
    """Turn latents back into frames, clamped to the range of a picture.

    latents: [B, 16, F, 12, 12] floating

    Returns frames: [B, F, 48, 48] in [0, 1], same dtype.
    """
    scaled = rearrange(latents, "b (p q) f h w -> b f (h p) (w q)", p=PATCH, q=PATCH)
    return (scaled * FRAME_STD + FRAME_MEAN).clamp(0, 1)
