"""Make the files in weights/: the word table, the judge, and the teacher (the small Wan itself).

Each command is one line; the first two run on a laptop, the last wants a GPU:
    python -m linvideo_core.demo.train prompts
    python -m linvideo_core.demo.train judge
    python -m linvideo_core.demo.train teacher --seconds 480 --compile
A quick look at the teacher's training on a CPU:
    python -m linvideo_core.demo.train teacher --steps 10 --batch-size 4 --num-samples 0 --out t/x
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import flow
from ..models.wan import WanConfig, WanModel, load_wan
from . import weights_path
from .codec import LATENT_SHAPE, decode_latents, encode_frames
from .digits import DigitImages, load_digit_images, sample_clips
from .judge import Judge, feature_statistics, load_judge, measure_clips
from .prompts import TEXT_DIM, all_prompts, encode_prompts, make_word_table, parse_prompt

logger = logging.getLogger(__name__)

Progress = Callable[[float, int, float], None]
"""`(fraction done, steps done, loss)`"""

SHIFT = 3.0
EMA_DECAY = 0.999
TEACHER = WanConfig(
    dim=128, num_heads=1, num_layers=10, ffn_dim=512, text_dim=TEXT_DIM, freq_dim=256
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How to train the judge; the defaults take about six minutes on two CPU cores."""

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    label_smoothing: float = 0.05
    num_measured: int = 8192
    seed: int = 0
    device: str = "cpu"
    out: Path = weights_path("judge.safetensors")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How to train and measure the teacher; training ends at whichever budget runs out first."""

    seconds: float = 480.0
    steps: int = 1_000_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    prompt_drop: float = 0.12
    compile: bool = False
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = weights_path("teacher.safetensors")
    guidance: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0)
    num_samples: int = 1000
    sampling_steps: int = 50


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Write a safetensors file in one move, so a crash never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})
    os.replace(temporary, path)


def augment_clips(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil clips as a generator might: blur, gain, gamma, flicker, grain and blotches.

    frames: [B, F, 48, 48] fp32, [0, 1]

    Returns [B, F, 48, 48] in [0, 1].
    """
    B, num_frames, height, width = frames.shape

    def uniform(low: float, high: float, *size: int) -> Tensor:
        draw = torch.rand(B, *size, 1, 1, 1, generator=generator, device=frames.device)
        return low + (high - low) * draw.view(B, -1, 1, 1)

    def grain(size: int) -> Tensor:
        return torch.randn(B, num_frames, size, size, generator=generator, device=frames.device)

    blurred = F.avg_pool2d(frames, 3, stride=1, padding=1)
    frames = frames.lerp(blurred, uniform(-0.5, 1.0).clamp(min=0))
    frames = frames.clamp(min=1e-4) ** uniform(0.7, 1.4) * uniform(0.7, 1.2)
    frames = frames * uniform(0.9, 1.1, num_frames)
    blotches = F.interpolate(grain(height // 4), size=(height, width), mode="bilinear")
    frames = frames + grain(height) * uniform(-0.05, 0.12).clamp(min=0)
    return (frames + blotches * uniform(-0.05, 0.08).clamp(min=0)).clamp(0, 1)


def draw_poses(batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw small turns (12 degrees), zooms and slants [B, 2, 2] for `render_clips`."""
    draw = torch.rand(4, batch_size, generator=generator, device=generator.device) * 2 - 1
    angle, zoom, slant = draw[0] * 0.2, 1 + draw[1] * 0.12, draw[2] * 0.15
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([cos, slant - sin, sin, cos], dim=-1).view(batch_size, 2, 2)


def train_judge(config: JudgeConfig, *, progress: Progress | None = None) -> dict[str, float]:
    """Train the judge on real clips, measure it on held-out handwriting, write its file.

    Returns the held-out measures, which the file's metadata repeats.
    """
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    generator = torch.Generator(device).manual_seed(config.seed)
    source = load_digit_images("train", device=device)
    judge = Judge().to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    for step in range(config.steps):
        pose = draw_poses(config.batch_size, generator)
        clips = sample_clips(source, config.batch_size, generator=generator, pose=pose)
        digit_logits, motion_logits, _ = judge(augment_clips(clips.frames, generator))
        loss = sum(
            F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            for logits, labels in ((digit_logits, clips.digits), (motion_logits, clips.directions))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None and (step + 1) % 20 == 0:
            progress((step + 1) / config.steps, step + 1, loss.item())
    return finish_judge(judge.eval(), source, config)


@torch.no_grad()
def finish_judge(judge: Judge, source: DigitImages, config: JudgeConfig) -> dict[str, float]:
    """Store the features of real clips in the judge, measure it in fp16 weights, save it."""
    device = source.images.device
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    for parameter in judge.parameters():
        parameter.copy_(parameter.half())
    clips = sample_clips(source, config.num_measured, generator=generator)
    features = torch.cat([judge(part)[2] for part in clips.frames.split(256)])
    mean, cov = feature_statistics(features)
    judge.real_mean.copy_(mean)
    judge.real_cov.copy_(cov)

    held_out = load_digit_images("held-out", device=device)
    clips = sample_clips(held_out, 4000, generator=generator)
    measures = {f"held_out_{name}": value for name, value in measure_clips(judge, *clips).items()}
    clips = sample_clips(source, 1000, generator=generator)
    measures["frechet_of_1000_real_clips"] = measure_clips(judge, *clips)["frechet_distance"]
    tensors = {
        name: tensor if name.startswith("real_") else tensor.half()
        for name, tensor in judge.state_dict().items()
    }
    save_weights(config.out, tensors, {"measures": measures, "seed": config.seed})
    return measures


def train_teacher(config: TeacherConfig, *, progress: Progress | None = None) -> None:
    """Train the small Wan by flow matching (velocity `noise - x0`) and save its EMA weights."""
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    generator = torch.Generator(device).manual_seed(config.seed)
    source = load_digit_images("train", device=device)
    prompt_table = encode_prompts([*all_prompts(), ""], device=device)
    model = WanModel(TEACHER)
    model.init_weights()
    model.to(device)
    if config.compile:
        for block in model.blocks:
            block.compile()
    parameters = list(model.parameters())
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    step, done, started = 0, 0.0, time.monotonic()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, step, done)
        loss = teacher_loss(model, source, prompt_table, config, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        step += 1
        if step == 1 or step % 20 == 0:
            # Reading the loss waits for the device: the clock then tells the truth.
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"The teacher's loss is {value} at step {step}.")
            if progress is not None:
                progress(done, step, value)
        if step == 1:
            # The first step compiles, which the budget does not count.
            started = time.monotonic()
        done = max(step / config.steps, (time.monotonic() - started) / config.seconds)
    names = [name for name, _ in model.named_parameters()]
    tensors = {name: tensor.half() for name, tensor in zip(names, averaged, strict=True)}
    settings = asdict(config) | {"out": config.out.name}
    save_weights(config.out, tensors, {"config": settings, "steps": step, "loss": value})


def learning_rate_factor(config: TeacherConfig, step: int, done: float) -> float:
    """Warm up over the first steps, then fall as a cosine of the budget spent, 1 -> 0."""
    return min((step + 1) / config.warmup_steps, 1.0) * (1 + math.cos(math.pi * done)) / 2


def teacher_loss(
    model: WanModel,
    source: DigitImages,
    prompt_table: Tensor,
    config: TeacherConfig,
    generator: torch.Generator,
) -> Tensor:
    """Draw a batch and return the flow-matching loss at uniform noise levels warped by the shift.

    prompt_table: [81, 8, 4096] fp32, all prompts in order, then the unconditional one
    """
    clips = sample_clips(source, config.batch_size, generator=generator)
    device = clips.frames.device
    x0 = encode_frames(clips.frames)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    chance, keep = torch.rand(2, config.batch_size, generator=generator, device=device)
    sigma = flow.shift_sigmas(chance, SHIFT)
    prompt_index = clips.digits * 8 + clips.directions
    prompt_index = torch.where(keep < config.prompt_drop, len(prompt_table) - 1, prompt_index)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        noisy = flow.add_noise(x0, noise, sigma)
        velocity = model(noisy, 1000 * sigma, prompt_table[prompt_index])
    return F.mse_loss(velocity.float(), noise - x0)


def evaluate_teacher(config: TeacherConfig) -> list[dict[str, float]]:
    """Sample the saved teacher, judge it at each guidance scale, write a record and a picture.

    Every scale starts from the same noise. Returns one row of measures for each scale.
    """
    device = torch.device(config.device)
    model = load_wan(config.out, device=device).eval()
    judge = load_judge(device)
    prompts = [all_prompts()[i % 80] for i in range(config.num_samples)]
    digits, directions = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    generator = torch.Generator(device).manual_seed(config.seed)
    noise = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator, device=device)
    sigmas = flow.make_sigmas(config.sampling_steps, SHIFT)
    rows = []
    for guidance_scale in config.guidance:
        frames = sample_frames(model, prompts, noise, sigmas, guidance_scale)
        row = {"guidance_scale": guidance_scale}
        row |= measure_clips(judge, frames, digits, directions)
        rows.append(row)
        logger.info("%s", row)
        # 37 is coprime to 80: the sheet shows many digits and directions.
        shown = [37 * i % len(prompts) for i in range(16)]
        save_contact_sheet(
            config.out.with_name(f"{config.out.stem}_{guidance_scale:g}.png"), frames[shown]
        )
    record = {
        "title": "Demo teacher by guidance scale",
        "command": f"python -m linvideo_core.demo.train teacher --seconds {config.seconds:g}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    config.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return rows


@torch.no_grad()
def sample_frames(
    model: WanModel, prompts: list[str], noise: Tensor, sigmas: Tensor, guidance_scale: float
) -> Tensor:
    """Sample clips with Euler steps and classifier-free guidance.

    noise: [B, 16, F, 12, 12] fp32
    sigmas: [steps + 1] fp32, falling 1 -> 0

    Returns frames [B, F, 48, 48] fp32, [0, 1].
    """
    device = noise.device
    embeds = encode_prompts(prompts + [""] * len(prompts), device=device)

    def velocity_fn(latents: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            both = model(latents.repeat(2, 1, 1, 1, 1), 1000 * sigma.repeat(2), embeds)
        return flow.guide(*both.float().chunk(2), guidance_scale)

    return decode_latents(flow.sample_euler(velocity_fn, noise, sigmas))


def save_contact_sheet(path: Path, frames: Tensor) -> None:
    """Write a PNG with one row for each clip of frames [B, F, H, W] and a column for each frame."""
    from PIL import Image

    padded = F.pad(frames, (1, 1, 1, 1), value=0.3)
    sheet = rearrange(padded, "b f h w -> (b h) (f w)").mul(255).round().byte().cpu()
    Image.fromarray(np.asarray(sheet)).save(path)


def main() -> None:
    """Read the command line, run one training, print what it measured."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prompts", "judge", "teacher"))
    parser.add_argument("--seconds", type=float, help="teacher: training time")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="file to write instead of the shipped one")
    parser.add_argument("--compile", action="store_true", default=None, help="teacher: faster")
    parser.add_argument("--guidance", type=float, nargs="+", help="teacher: scales to measure")
    parser.add_argument("--num-samples", type=int, help="teacher: clips to measure, 0 for none")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    what = given.pop("what")
    logging.basicConfig(level=logging.INFO)
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def progress(done: float, step: int, loss: float) -> None:
            bar.set_postfix_str(f"step {step}, loss {loss:.4f}", refresh=False)
            bar.update(100 * done - bar.n)

        if what == "prompts":
            path = given.get("out", weights_path("prompts.safetensors"))
            save_weights(path, make_word_table(given.get("seed", 0)), {})
        elif what == "judge":
            print(json.dumps(train_judge(JudgeConfig(**given), progress=progress), indent=1))
        else:
            config = TeacherConfig(**given)
            train_teacher(config, progress=progress)
            for row in evaluate_teacher(config) if config.num_samples else []:
                print(json.dumps(row))


if __name__ == "__main__":
    main()
