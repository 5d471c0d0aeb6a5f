r"""The teacher: a small Wan, trained from nothing on rendered clips, and files of prompts for it.

    torchrun --nproc-per-node 4 -m research.crowd.train --minutes 7 --compile
A quick look on a CPU:
    python -m research.crowd.train --steps 4 --batch-size 2 --num-prompts 8
The first half of the time goes to clips a quarter as long, of which a step takes four times as
many: they cost a ninth each and teach all but what lies far apart in time. `--out` then holds
model.safetensors, prompts.safetensors and held_out.safetensors, which all commands of
`linvideo_core` take as --model and --prompts, with --num-frames 61 --height 256 --width 256
--shift 5. Repeating the command continues where it stopped; `--start` trains a teacher on.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from linvideo_core import flow
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.quantized import Float8Linear, is_narrow
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_json
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option
from linvideo_core.run.files import write_tensors
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.training.fsdp import run_together

from .captions import NUM_TOKENS, TEXT_DIM, CaptionsConfig, embed, write_both
from .clips import LATENT_SHAPE, NUM_FRAMES, draw_scenes, encode_frames, render
from .fitting import FitConfig, fit, make_run

logger = logging.getLogger(__name__)

CROWD = WanConfig(dim=256, num_heads=2, num_layers=12, ffn_dim=768, text_dim=TEXT_DIM, freq_dim=256)
SHIFT = 5.0
"""The warp of the noise levels, in training and sampling: Wan's own for many tokens."""
WEIGHTS = Path("research/crowd/weights")
"""The stored teacher, its judge and a student, from a checkout's own folder."""

_SHORTER = 4
_SHARE_OF_PEAK, _PEAK = 0.4, 989e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How to train the teacher."""

    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    batch_size: int = option(64, "whole clips of a step, over all GPUs together", limits.COUNT)
    short_share: float = option(
        0.5, "share of the training with clips a quarter as long", limits.FRACTION
    )
    prompt_drop: float = option(
        0.1, "share of the clips trained without a caption", limits.FRACTION
    )
    compile: bool = option(False, "compile the blocks: a minute at the start, then much faster")
    start: Path | None = option(None, "model.safetensors to start from; none: random weights")
    num_prompts: int = option(2000, "captions of each file of prompts", limits.COUNT)
    out: Path = option(Path("runs/crowd"), "folder of the model and its prompts")
    seed: int = option(0, "seed of weights, clips and noise")
    device: str = device_option()


def count_flops(wan: WanConfig, num_frames: int = NUM_FRAMES) -> int:
    """Return the floating-point operations of training on one clip: of the blocks' products alone.

    A product's backward pass has twice those of its forward pass.
    """
    _, _, H, W = LATENT_SHAPE
    num_tokens = num_frames // 4 * (H // 2) * (W // 2)
    projections = 6 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim
    attention = 2 * (num_tokens + NUM_TOKENS) * wan.dim
    return 3 * 2 * wan.num_layers * num_tokens * (projections + attention)


def predict_steps(config: TrainConfig, wan: WanConfig, num_gpus: int) -> dict[str, int]:
    """Return how many steps with short and whole clips H200s take at 40 % of their peak."""
    rate = num_gpus * _SHARE_OF_PEAK * _PEAK
    seconds = 60 * config.fit.minutes
    short = count_flops(wan, NUM_FRAMES // _SHORTER) * _SHORTER * config.batch_size
    whole = count_flops(wan) * config.batch_size
    share = config.short_share
    return {
        "short": int(share * seconds * rate / short),
        "whole": int((1 - share) * seconds * rate / whole),
    }


def teacher_loss(
    model: WanModel, config: TrainConfig, run: Run, done: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Draw a batch; return the flow-matching loss of this process's rows and the clips of all.

    The model learns the velocity `noise - x0` at noise levels that are uniform before the warp.
    """
    is_short = done < config.short_share
    count = config.batch_size * (_SHORTER if is_short else 1)
    length = NUM_FRAMES // (_SHORTER if is_short else 1)
    scenes = draw_scenes(count, generator)
    level, keep, start = torch.rand(3, count, generator=generator, device=run.device)
    C, _, H, W = LATENT_SHAPE
    size = (count, C, length // 4, H, W)
    noise = torch.randn(size, generator=generator, device=run.device)
    rows = slice(run.processes.rank, None, run.processes.size)
    begin = (start[rows, None] * (NUM_FRAMES - length + 1)).floor()
    scenes, noise = scenes.take(rows), noise[rows]
    times = begin + torch.arange(length, device=run.device)
    x0 = encode_frames(render(scenes, times).frames)
    sigma = flow.shift_sigmas(level[rows], SHIFT)
    embeds = embed(scenes.labels) * (keep[rows] >= config.prompt_drop).view(-1, 1, 1)
    velocity_fn = flow.bind(model, embeds, precision=run.precision)
    velocity = velocity_fn(flow.add_noise(x0, noise, sigma), sigma)
    return F.mse_loss(velocity.float(), noise - x0), count


def narrow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Wan's weights as its file holds them: the blocks' matrices fp8, the rest fp16.

    A matrix [out, in] has a scale [out, 1] fp32 beside it, as ComfyUI's fp8_scaled files have it.
    """
    tensors = {name: tensor.half() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if is_narrow(name, tuple(tensor.shape)):
            narrowed = Float8Linear(tensor, None)
            tensors[name], tensors[f"{name}_scale"] = narrowed.weight, narrowed.scale
    return tensors


def train_teacher(config: TrainConfig, run: Run, wan: WanConfig = CROWD) -> dict[str, float]:
    """Train the teacher; write model.safetensors and both files of prompts.

    Returns how many steps and clips it took in how many seconds.
    """
    torch.manual_seed(config.seed)
    if config.start is None:
        model = WanModel(wan)
        model.init_weights()
    else:
        model = load_wan(config.start)
    model.to(run.device)
    if config.compile:
        for block in model.blocks:
            # Two sizes, each compiled for itself: code for any size would be slower.
            block.compile(dynamic=False)
    reached = fit(
        model,
        lambda done, generator: teacher_loss(model, config, run, done, generator),
        config.fit,
        run,
    )
    if run.processes.is_first:
        tensors = narrow(model.state_dict())
        metadata = {"settings": to_json(config), "reached": json.dumps(reached)}
        write_tensors(run.folder / "model.safetensors", tensors, metadata)
        write_both(CaptionsConfig(num_prompts=config.num_prompts, out=run.folder))
    run.processes.wait()
    return reached


def main(processes: ProcessGroup) -> None:
    """Read the command line, say what to expect, train."""
    config = parse(TrainConfig, None, description=__doc__)
    run = make_run(config, processes)
    if processes.is_first:
        predicted = predict_steps(config, CROWD, processes.size)
        logger.info(
            "%d H200s at 40 %% of their peak would take %s steps", processes.size, predicted
        )
    reached = train_teacher(config, run)
    if processes.is_first:
        logger.info("trained: %s", reached)


if __name__ == "__main__":
    run_command(lambda: run_together(main))
