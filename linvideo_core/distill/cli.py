"""Distil a linearized model to a few steps: `python -m linvideo_core.distill`.

Without arguments the embedded model's own file is distilled on whatever machine this is.
    python -m linvideo_core.distill --preset gpu
    python -m linvideo_core.distill --model wan.safetensors --prompts prompts.safetensors \\
        --artifact linearized.safetensors --guidance-scale 5 --real-guidance-scale 5 --shift 5
Repeating a command continues where it stopped. The run folder holds config.json, metrics,
checkpoints, the result, distilled.safetensors, and the evidence: pictures and evaluation.json,
which compare steps against quality. What the teacher sampled lies beside it, see `transfer`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.config import parse
from .config import DistillConfig

SHOWN = (
    "model",
    "prompts",
    "text_encoder",
    "artifact",
    "num_frames",
    "height",
    "width",
    "guidance_scale",
    "real_guidance_scale",
    "shift",
    "num_trajectories",
    "num_steps",
    "steps",
    "batch_size",
    "learning_rate",
    "lora_rank",
    "frozen",
    "offload_blocks",
    "activation_checkpointing",
    "evaluate_samples",
    "out",
    "seed",
    "device",
)
"""The settings that `--help` shows."""

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "num_trajectories": 8,
        "warm_start_steps": 40,
        "steps": 400,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "map_learning_rate": 1e-4,
        "critic_learning_rate": 2e-4,
        "warmup_steps": 10,
        "ema_decay": 0.9,
        "checkpoint_every": 50,
        "log_every": 5,
    },
    "gpu": {
        "out": Path("runs/distill-gpu"),
        "num_trajectories": 256,
        "shard_size": 256,
        "warm_start_steps": 300,
        "steps": 1000,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "map_learning_rate": 5e-4,
        "critic_learning_rate": 1e-3,
        "critic_steps": 3,
        # Towards what the teacher's guided videos are as a whole, not to the most typical of them.
        "real_guidance_scale": 1.5,
        "regression_weight": 1.0,
        "warmup_steps": 50,
        "ema_decay": 0.98,
        "compile": True,
        "checkpoint_every": 250,
        "log_every": 10,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, distil, say what was made."""
    config = parse(DistillConfig, argv, description=__doc__, presets=PRESETS, shown=SHOWN)
    # PyTorch is imported here, when it is needed.
    from .command import main as distil

    distil(config)
