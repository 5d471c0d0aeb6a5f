"""Train the demo's Wan from scratch by flow matching, on clips made on the fly."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from linvideo_core import flow
from linvideo_core.demo import DEMO_SHIFT, DEMO_STEPS, weights_path
from linvideo_core.demo.codec import encode_frames
from linvideo_core.demo.prompts import TEXT_DIM, all_prompts, encode_prompts
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.config import fraction, option, positive
from linvideo_core.run.files import write_tensors

from .digits import DigitImages, load_digit_images, sample_clips

EMA_DECAY = 0.999
TEACHER = WanConfig(
    dim=128, num_heads=1, num_layers=10, ffn_dim=512, text_dim=TEXT_DIM, freq_dim=256
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How to train and measure the teacher; training ends at whichever budget runs out first."""

    seconds: float = option(480.0, "training time, without compilation and measuring")
    steps: int = option(1_000_000, "most optimizer steps")
    batch_size: int = option(256, "clips in a step")
    learning_rate: float = option(1e-3, "peak, after the warm-up and before the cosine decay")
    warmup_steps: int = option(300, "steps over which the learning rate rises")
    prompt_drop: float = option(0.12, "fraction of clips trained without a prompt")
    compile: bool = option(False, "compile each block: slower to start, faster to train")
    seed: int = option(0, "seed of weights, clips and noise")
    device: str = option("cuda", "where to train and measure")
    out: Path | None = option(None, "file to write; none: the shipped one")
    guidance: str = option("1.5,2,3,4,5", "guidance scales to measure, separated by commas")
    num_samples: int = option(1000, "clips to measure at each guidance scale; 0: none")
    sampling_steps: int = option(DEMO_STEPS, "Euler steps when measuring")

    def __post_init__(self) -> None:
        positive(self, "seconds", "steps", "batch_size", "warmup_steps", "sampling_steps")
        fraction(self, "prompt_drop")

    @property
    def path(self) -> Path:
        """The file to write."""
        return self.out or weights_path("model.safetensors")


def train_teacher(config: TeacherConfig) -> None:
    """Train the small Wan by flow matching (velocity `noise - x0`) and save its EMA weights."""
    config.path.parent.mkdir(parents=True, exist_ok=True)
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
    bar = tqdm(desc="training", total=1000)
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
            bar.set_postfix(step=step, loss=value, refresh=False)
            bar.update(int(1000 * done) - bar.n)
        if step == 1:
            # The first step compiles, which the budget does not count.
            started = time.monotonic()
        done = max(step / config.steps, (time.monotonic() - started) / config.seconds)
    names = [name for name, _ in model.named_parameters()]
    tensors = {name: tensor.half() for name, tensor in zip(names, averaged, strict=True)}
    bar.close()
    settings = asdict(config) | {"out": None}
    metadata = {"training": json.dumps(settings), "steps": str(step), "loss": f"{value:.4f}"}
    write_tensors(config.path, tensors, metadata)


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
    sigma = flow.shift_sigmas(chance, DEMO_SHIFT)
    prompt_index = clips.digits * 8 + clips.directions
    prompt_index = torch.where(keep < config.prompt_drop, len(prompt_table) - 1, prompt_index)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        noisy = flow.add_noise(x0, noise, sigma)
        velocity = model(noisy, 1000 * sigma, prompt_table[prompt_index])
    return F.mse_loss(velocity.float(), noise - x0)
