"""The judge: a network, trained on rendered clips alone, that answers a caption's questions.

    python -m research.crowd.judge --minutes 1
A quick look on a CPU:
    python -m research.crowd.judge --minutes 1 --batch-size 8 --num-measured 64
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from linvideo_core.flow import autocast
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_json
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option
from linvideo_core.run.files import write_tensors
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.training.fsdp import run_together

from .clips import (
    BARS,
    LATENT_SHAPE,
    MOTIONS,
    NO_SHAPE,
    PANS,
    SIZES,
    SPEEDS,
    Labels,
    draw_scenes,
    encode_frames,
    render,
)
from .fitting import FitConfig, fit, make_run

logger = logging.getLogger(__name__)

QUESTIONS = ("object", "motion", "speed", "size", "bar", "pan")
CHANNELS = (48, 96, 128)
# Samples are never as clean as rendered clips.
_MAX_NOISE = 0.2
_SPRITE_ANSWERS = (len(MOTIONS), len(SPEEDS), len(SIZES))
_HELD_OUT_SEED = 0x7E57


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig(Settings):
    """How to train the judge."""

    fit: FitConfig = dataclasses.field(
        default_factory=lambda: FitConfig(minutes=1.0, learning_rate=2e-3, weight_decay=0.05)
    )
    batch_size: int = option(128, "clips of a step, over all GPUs together", limits.COUNT)
    num_measured: int = option(2048, "held-out clips to measure it on", limits.COUNT)
    out: Path = option(Path("runs/crowd/judge"), "folder; the judge is the file judge.safetensors")
    seed: int = option(0, "seed of weights and clips")
    device: str = device_option()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What the judge says of clips, as logits.

    shape: [B, 8], whether there is such a sprite; motion [B, 8, 7], speed and size [B, 8, 2] of it.
    bar: [B, 3]; pan: [B, 5]; features: [B, D] of unit variance, what a Frechet distance is of.
    """

    shape: Tensor
    motion: Tensor
    speed: Tensor
    size: Tensor
    bar: Tensor
    pan: Tensor
    features: Tensor


class Judge(nn.Module):
    """3-D convolutions over latents, then one query a shape that looks for its sprite."""

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        first, second, width = channels
        self.layers = nn.Sequential(
            _convolve(LATENT_SHAPE[0], first, (1, 1, 1)),
            _convolve(first, second, (1, 2, 2)),
            _convolve(second, width, (2, 2, 2)),
            _convolve(width, width, (2, 1, 1)),
            _convolve(width, width, (1, 1, 1)),
        )
        self.query = nn.Linear(width, NO_SHAPE)
        self.value = nn.Linear(width, width)
        self.sprite_head = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1 + sum(_SPRITE_ANSWERS))
        )
        self.scene_head = nn.Linear(width, len(BARS) + len(PANS))
        self.norm = nn.LayerNorm(2 * width, elementwise_affine=False)

    def forward(self, latents: Tensor) -> Answers:
        """Judge latents [B, 16, F, H, W]."""
        places = self.layers(latents).flatten(2).transpose(1, 2)
        attention = self.query(places).float().softmax(dim=1).to(places.dtype)
        sprites = attention.transpose(1, 2) @ self.value(places)
        shape, *rest = self.sprite_head(sprites).float().split([1, *_SPRITE_ANSWERS], dim=-1)
        shape = shape.squeeze(-1)
        mean = places.float().mean(dim=1)
        bar, pan = self.scene_head(mean).float().split([len(BARS), len(PANS)], dim=-1)
        share = shape.sigmoid() / shape.sigmoid().sum(dim=1, keepdim=True)
        found = torch.einsum("bs,bsd->bd", share, sprites.float())
        features = self.norm(torch.cat([mean, found], dim=-1))
        names = ("motion", "speed", "size")
        sprite = dict(zip(names, rest, strict=True))
        return Answers(shape=shape, bar=bar, pan=pan, features=features, **sprite)


def _convolve(inputs: int, outputs: int, stride: tuple[int, int, int]) -> nn.Sequential:
    convolution = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())


def presence(labels: Labels) -> Tensor:
    """Return which of the shapes are in a scene, [B, 8] bool."""
    return F.one_hot(labels.shape, NO_SHAPE + 1).sum(dim=1)[:, :NO_SHAPE].bool()


def judge_loss(answers: Answers, labels: Labels) -> Tensor:
    """Return the sum of the cross entropies of all questions."""
    is_there = labels.is_there
    rows, shape = is_there.nonzero()[:, 0], labels.shape[is_there]
    loss = F.binary_cross_entropy_with_logits(answers.shape, presence(labels).float())
    for name in ("motion", "speed", "size"):
        logits = getattr(answers, name)[rows, shape]
        loss = loss + F.cross_entropy(logits, getattr(labels, name)[is_there])
    return loss + sum(
        F.cross_entropy(getattr(answers, name), getattr(labels, name)) for name in ("bar", "pan")
    )


def is_right(answers: Answers, labels: Labels) -> dict[str, Tensor]:
    """Return for each question whether the clip shows what the caption says, [B] in [0, 1].

    Of sprites it is the share of those named. An object is found if its shape is among as many of
    the judge's likeliest as the caption names.
    """
    is_there, weight = labels.is_there, labels.is_there.float()
    weight = weight / weight.sum(dim=1, keepdim=True)
    shape = labels.shape.clamp(max=NO_SHAPE - 1)
    rank = answers.shape.argsort(dim=1, descending=True).argsort(dim=1)
    found = rank.gather(1, shape) < is_there.sum(dim=1, keepdim=True)
    right = {"object": (found * weight).sum(dim=1)}
    rows = torch.arange(len(labels), device=shape.device)[:, None]
    for name in ("motion", "speed", "size"):
        best = getattr(answers, name).argmax(dim=-1)[rows, shape]
        right[name] = ((best == getattr(labels, name)) * weight).sum(dim=1)
    for name in ("bar", "pan"):
        right[name] = (getattr(answers, name).argmax(dim=-1) == getattr(labels, name)).float()
    return right


def train_judge(
    config: JudgeConfig, run: Run, channels: Sequence[int] = CHANNELS
) -> dict[str, float]:
    """Train the judge, write judge.safetensors; return its accuracy on held-out captions."""
    torch.manual_seed(config.seed)
    judge = Judge(channels).to(run.device)
    rows = slice(run.processes.rank, None, run.processes.size)

    def loss_fn(done: float, generator: torch.Generator) -> tuple[Tensor, int]:
        scenes = draw_scenes(config.batch_size, generator)
        strength = torch.rand(config.batch_size, generator=generator, device=run.device)
        size = (config.batch_size, *LATENT_SHAPE)
        noise = torch.randn(size, generator=generator, device=run.device)[rows]
        latents = encode_frames(render(scenes.take(rows)).frames)
        latents = latents + _MAX_NOISE * strength[rows].view(-1, 1, 1, 1, 1) * noise
        with autocast(run.device, run.precision):
            answers = judge(latents)
        return judge_loss(answers, scenes.labels.take(rows)), config.batch_size

    reached = fit(judge, loss_fn, config.fit, run)
    measures = measure_judge(judge, config.num_measured, run)
    if run.processes.is_first:
        metadata = {"measures": json.dumps(measures), "reached": json.dumps(reached)}
        path = run.folder / "judge.safetensors"
        tensors = {name: tensor.half() for name, tensor in judge.state_dict().items()}
        write_tensors(path, tensors, {**metadata, "settings": to_json(config)})
    return measures


@torch.no_grad()
def measure_judge(judge: Judge, count: int, run: Run) -> dict[str, float]:
    """Return the judge's accuracy on rendered clips of captions that no training has seen."""
    generator = torch.Generator(run.device).manual_seed(_HELD_OUT_SEED)
    found = []
    for size in [64] * (count // 64) + [count % 64] * (count % 64 > 0):
        scenes = draw_scenes(size, generator, is_held_out=True)
        with autocast(run.device, run.precision):
            answers = judge(encode_frames(render(scenes).frames))
        found.append(torch.stack([*is_right(answers, scenes.labels).values()]))
    return dict(zip(QUESTIONS, torch.cat(found, dim=1).mean(dim=1).tolist(), strict=True))


def load_judge(path: Path, device: torch.device | str) -> Judge:
    """Load a judge that `train_judge` wrote, ready to measure."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; python -m research.crowd.judge makes it")
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    judge = Judge([len(state[f"layers.{i}.0.weight"]) for i in range(3)])
    judge.load_state_dict(state)
    return judge.eval().requires_grad_(False).to(device)


def main(processes: ProcessGroup) -> None:
    """Read the command line, train the judge, log its accuracy."""
    config = parse(JudgeConfig, None, description=__doc__)
    run = make_run(config, processes)
    measures = train_judge(config, run)
    if processes.is_first:
        logger.info("accuracy on held-out captions: %s", measures)


if __name__ == "__main__":
    run_command(lambda: run_together(main))
