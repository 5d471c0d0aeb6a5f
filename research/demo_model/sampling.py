"""Draw clips from the demo's model, measure them, show them."""

from itertools import cycle, islice
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
from linvideo_core.demo.prompts import all_prompts, encode_prompts, parse_prompt
from linvideo_core.evaluate.metrics import accuracy, feature_statistics, frechet_distance
from linvideo_core.flow import bind_guided
from linvideo_core.models.wan import WanModel


def sample_and_measure(
    model: WanModel,
    judge: Judge,
    *,
    guidance_scale: float,
    num_samples: int = 1000,
    steps: int = DEMO_STEPS,
    seed: int = 0,
) -> tuple[dict[str, float], Tensor]:
    """Sample all prompts in turn on the judge's device and measure the clips.

    The seed alone decides the noise, so two models can be compared clip by clip.

    Returns the measures of `measure_clips` and frames [num_samples, F, 32, 32] fp32, [0, 1].
    """
    device = judge.real_mean.device
    prompts = list(islice(cycle(all_prompts()), num_samples))
    digits, directions = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_samples, *LATENT_SHAPE, generator=generator).to(device)
    sigmas = flow.make_sigmas(steps, DEMO_SHIFT)
    frames = sample_frames(model, prompts, noise, sigmas, guidance_scale=guidance_scale)
    return measure_clips(judge, frames, digits, directions), frames


@torch.no_grad()
def sample_frames(
    model: WanModel,
    prompts: list[str],
    noise: Tensor,
    sigmas: Tensor,
    *,
    guidance_scale: float,
    batch_size: int = 250,
) -> Tensor:
    """Sample clips with Euler steps and classifier-free guidance; bf16 autocast on CUDA.

    noise: [B, 16, F, H, W] fp32
    sigmas: [steps + 1] fp32, falling 1 -> 0

    Returns frames [B, F, 32, 32] fp32, [0, 1].
    """
    device = noise.device
    precision = "bf16" if device.type == "cuda" else "fp32"
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
