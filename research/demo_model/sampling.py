"""Draw clips from the demo's model, measure them, show them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from linvideo_core import flow
from linvideo_core.demo import DEMO_SHIFT, DEMO_STEPS
from linvideo_core.demo.classifier import Judge
from linvideo_core.demo.codec import LATENT_SHAPE, decode_latents
from linvideo_core.demo.prompts import encode_prompts
from linvideo_core.evaluate.metrics import accuracy, feature_statistics, frechet_distance
from linvideo_core.flow import bind_guided
from linvideo_core.models.wan import WanModel


@torch.no_grad()
def sample_frames(
    model: WanModel,
    prompts: list[str],
    device: str,
    *,
    guidance_scale: float,
    seed: int,
    batch_size: int = 250,
) -> Tensor:
    """Sample clips with Euler steps and classifier-free guidance; bf16 autocast on CUDA.

    The seed alone decides the noise, so two models can be compared clip by clip.

    Returns frames [len(prompts), F, 32, 32] fp32, [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator).to(device)
    sigmas = flow.make_sigmas(DEMO_STEPS, DEMO_SHIFT)
    precision = "bf16" if noise.device.type == "cuda" else "fp32"
    unconditional = encode_prompts([""], device=device)
    parts = []
    for start in range(0, len(prompts), batch_size):
        embeds = encode_prompts(prompts[start : start + batch_size], device=device)
        velocity_fn = bind_guided(
            model, embeds, unconditional.expand_as(embeds), guidance_scale, precision=precision
        )
        latents = flow.sample_euler(velocity_fn, noise[start : start + batch_size], sigmas)
        parts.append(decode_latents(latents))
    return torch.cat(parts)


def save_contact_sheet(path: Path, frames: Tensor) -> None:
    """Write a PNG with one row for each clip of frames [B, F, H, W] and a column for each frame."""
    from PIL import Image

    padded = F.pad(frames, (1, 1, 1, 1), value=0.3)
    sheet = rearrange(padded, "b f h w -> (b h) (f w)").mul(255).round().byte().cpu()
    Image.fromarray(np.asarray(sheet)).save(path)


@torch.no_grad()
def measure_clips(
    judge: Judge, frames: Tensor, digits: Tensor, directions: Tensor, *, batch_size: int = 250
) -> dict[str, float]:
    """Measure how well clips show what was asked and how close they are to real clips.

    frames: [B, F, 32, 32] floating, [0, 1]
    digits, directions: [B] int64, the labels that were asked for

    Returns digit_accuracy and motion_accuracy in [0, 1] and frechet_distance (0 is best).
    """
    judged = [judge(part.float()) for part in frames.split(batch_size)]
    digit_logits, motion_logits, features = (torch.cat(part) for part in zip(*judged, strict=True))
    mean, cov = feature_statistics(features)
    return {
        "digit_accuracy": accuracy(digit_logits, digits),
        "motion_accuracy": accuracy(motion_logits, directions),
        "frechet_distance": frechet_distance(mean, cov, judge.real_mean, judge.real_cov),
    }
