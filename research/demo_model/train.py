r"""Make the files in weights/: the word table, the judge, and the teacher (the small Wan itself).

Each command is one line; the first two run on a laptop, the last wants a GPU:
    python -m research.demo_model.train prompts
    python -m research.demo_model.train judge
    python -m research.demo_model.train teacher --seconds 320 --learning-rate 1.5e-3 --compile
A quick look at the teacher's training on a CPU:
    python -m research.demo_model.train teacher --device cpu --steps 10 --batch-size 4 \
        --num-samples 0 --out quick.safetensors
"""

import dataclasses
import itertools
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.record import write_record
from linvideo_core import flow
from linvideo_core.demo import DEMO_SHIFT, weights_path
from linvideo_core.demo.classifier import Judge, load_judge
from linvideo_core.demo.codec import encode_frames
from linvideo_core.demo.prompts import (
    TEXT_DIM,
    all_prompts,
    encode_prompts,
    make_word_table,
    parse_prompt,
)
from linvideo_core.evaluate.metrics import feature_statistics
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.files import write_tensors

from .digits import DigitImages, augment_clips, draw_poses, load_digit_images, sample_clips
from .sampling import measure_clips, sample_frames, save_contact_sheet

logger = logging.getLogger(__name__)

EMA_DECAY, LABEL_SMOOTHING = 0.999, 0.05
TEACHER = WanConfig(
    dim=128, num_heads=1, num_layers=10, ffn_dim=512, text_dim=TEXT_DIM, freq_dim=256
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """How to draw the word table."""

    seed: int = option(0, "seed of the word vectors")
    out: Path | None = option(None, "file to write; none: the shipped one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How to train the judge; the defaults take some minutes on two CPU cores."""

    steps: int = option(2000, "optimizer steps")
    batch_size: int = option(64, "clips in a step")
    learning_rate: float = option(2e-3, "peak of the one-cycle schedule")
    num_measured: int = option(8192, "real clips behind the stored mean and covariance")
    seed: int = option(0, "seed of weights and clips")
    device: str = option("cpu", "where to train")
    out: Path | None = option(None, "file to write; none: the shipped one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings):
    """How to train and measure the teacher; training ends at whichever budget runs out first."""

    seconds: float = option(
        480.0, "training time, without compilation and measuring", limits.POSITIVE
    )
    steps: int = option(1_000_000, "most optimizer steps", limits.COUNT)
    batch_size: int = option(256, "clips in a step", limits.COUNT)
    learning_rate: float = option(1e-3, "peak, after the warm-up and before the cosine decay")
    warmup_steps: int = option(300, "steps over which the learning rate rises", limits.COUNT)
    prompt_drop: float = option(0.12, "fraction of clips trained without a prompt", limits.FRACTION)
    compile: bool = option(False, "compile each block: slower to start, faster to train")
    seed: int = option(0, "seed of weights, clips and noise")
    device: str = option("cuda", "where to train and measure")
    out: Path | None = option(None, "file to write; none: the shipped one")
    guidance: str = option("1.5,2,3,4,5", "guidance scales to measure, separated by commas")
    num_samples: int = option(1000, "clips to measure at each guidance scale; 0: none")

    @property
    def path(self) -> Path:
        """The file to write."""
        return self.out or weights_path("model.safetensors")


def train_judge(config: JudgeConfig) -> dict[str, float]:
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
    for _ in tqdm(range(config.steps), "training"):
        pose = draw_poses(config.batch_size, generator)
        clips = sample_clips(source, config.batch_size, generator=generator, pose=pose)
        digit_logits, motion_logits, _ = judge(augment_clips(clips.frames, generator))
        loss = sum(
            F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
            for logits, labels in ((digit_logits, clips.digits), (motion_logits, clips.directions))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
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
    path = config.out or weights_path("judge.safetensors")
    logger.info("%s", measures)
    write_tensors(path, tensors, {"measures": json.dumps(measures), "seed": str(config.seed)})
    return measures


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
    settings = dataclasses.asdict(config) | {"out": None}
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


def evaluate_teacher(config: TeacherConfig) -> list[dict[str, float]]:
    """Sample the saved teacher, judge it at each guidance scale, write a record and a picture.

    Every scale starts from the same noise. Returns one row of measures for each scale.
    """
    model = load_wan(config.path, device=config.device).eval()
    judge = load_judge(config.device)
    prompts = list(itertools.islice(itertools.cycle(all_prompts()), config.num_samples))
    labels = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    rows = []
    for guidance_scale in map(float, config.guidance.split(",")):
        frames = sample_frames(
            model, prompts, config.device, guidance_scale=guidance_scale, seed=config.seed
        )
        row = {"guidance_scale": guidance_scale, **measure_clips(judge, frames, *labels)}
        rows.append(row)
        logger.info("%s", row)
        # 37 is coprime to 80: the sheet shows many digits and directions.
        shown = [37 * i % len(frames) for i in range(16)]
        save_contact_sheet(
            config.path.with_name(f"{config.path.stem}_{guidance_scale:g}.png"), frames[shown]
        )
    flags = to_flags(config, without=["out"])
    write_record(
        config.path.with_suffix(".json"),
        title="The demo's model by guidance scale",
        command=f"python -m research.demo_model.train teacher {flags}".strip(),
        rows=rows,
        device=config.device,
    )
    return rows


COMMANDS = {"prompts": PromptsConfig, "judge": JudgeConfig, "teacher": TeacherConfig}


def main() -> None:
    """Read the command line and train; measures are logged and stored beside the weights."""
    what, *flags = sys.argv[1:] or [""]
    if what in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\nEach command has its own --help.\n")
        return
    if what not in COMMANDS:
        raise ValueError(f"command {what!r} given; one of {', '.join(COMMANDS)} is needed")
    config = parse(COMMANDS[what], flags, description=__doc__)
    if isinstance(config, PromptsConfig):
        path = config.out or weights_path("prompts.safetensors")
        write_tensors(path, make_word_table(config.seed), {"seed": str(config.seed)})
    elif isinstance(config, JudgeConfig):
        train_judge(config)
    else:
        train_teacher(config)
        if config.num_samples:
            evaluate_teacher(config)


if __name__ == "__main__":
    run_command(main)
