"""A few videos of a model on disk, small enough to keep of every run, to be shown side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from linvideo_core.run.files import write_tensors


def write_frames(path: Path, frames: Tensor, prompts: Sequence[str]) -> None:
    """Write videos in 256 shades, with their prompts.

    frames: [B, F, h, w] floating in [0, 1]; what is not finite becomes black.
    """
    shades = frames.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"frames": shades}, {"prompts": json.dumps(list(prompts))})


def read_frames(path: Path) -> tuple[Tensor, list[str]]:
    """Return videos [B, F, h, w] fp32 in [0, 1] and their prompts."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("frames").float() / 255, json.loads(file.metadata()["prompts"])
