r"""Make the files in weights/: the word table, the judge, and the teacher (the small Wan itself).

Each command is one line; the first two run on a laptop, the last wants a GPU:
    python -m research.demo_model.train prompts
    python -m research.demo_model.train judge
    python -m research.demo_model.train teacher --seconds 320 --learning-rate 1.5e-3 --compile
A quick look at the teacher's training on a CPU:
    python -m research.demo_model.train teacher --device cpu --steps 10 --batch-size 4 \
        --num-samples 0 --out quick.safetensors
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.record import write_record
from linvideo_core.demo import weights_path
from linvideo_core.demo.classifier import Judge, load_judge
from linvideo_core.demo.prompts import make_word_table
from linvideo_core.evaluate.metrics import feature_statistics
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.run.config import option, parse, run_command, to_flags
from linvideo_core.run.files import write_tensors

from .digits import DigitImages, augment_clips, draw_poses, load_digit_images, sample_clips
from .flow_matching import TeacherConfig, train_teacher
from .sampling import measure_clips, sample_and_measure, save_contact_sheet

logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.05


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """How to draw the word table."""

    seed: int = option(0, "seed of the word vectors")
    out: Path | None = option(None, "file to write; none: the shipped one")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How to train the judge; the defaults take some minutes on two CPU cores."""

    steps: int = option(2000, "optimizer steps")
    batch_size: int = option(64, "clips in a step")
    learning_rate: float = option(2e-3, "peak of the one-cycle schedule")
    num_measured: int = option(8192, "real clips behind the stored mean and covariance")
    seed: int = option(0, "seed of weights and clips")
    device: str = option("cpu", "where to train")
    out: Path | None = option(None, "file to write; none: the shipped one")


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


def evaluate_teacher(config: TeacherConfig) -> list[dict[str, float]]:
    """Sample the saved teacher, judge it at each guidance scale, write a record and a picture.

    Every scale starts from the same noise. Returns one row of measures for each scale.
    """
    model = load_wan(config.path, device=config.device).eval()
    judge = load_judge(config.device)
    rows = []
    for guidance_scale in map(float, config.guidance.split(",")):
        measures, frames = sample_and_measure(
            model,
            judge,
            guidance_scale=guidance_scale,
            num_samples=config.num_samples,
            steps=config.sampling_steps,
            seed=config.seed,
        )
        row = {"guidance_scale": guidance_scale} | measures
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


def run(config: PromptsConfig | JudgeConfig | TeacherConfig) -> None:
    """Train what the config describes; the measures are logged and stored beside the weights."""
    if isinstance(config, PromptsConfig):
        path = config.out or weights_path("prompts.safetensors")
        write_tensors(path, make_word_table(config.seed), {"seed": str(config.seed)})
    elif isinstance(config, JudgeConfig):
        train_judge(config)
    else:
        train_teacher(config)
        if config.num_samples:
            evaluate_teacher(config)


def main() -> None:
    """Read the command line and train."""
    what, *flags = sys.argv[1:] or [""]
    if what not in COMMANDS:
        raise ValueError(f"command {what!r} given; one of {', '.join(COMMANDS)} is needed")
    config = parse(COMMANDS[what], flags, description=__doc__)
    run(config)


if __name__ == "__main__":
    run_command(main)
