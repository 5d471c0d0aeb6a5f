"""Linearize a video model: `python -m linvideo_core.transfer`.

Without arguments the embedded model is linearized on whatever machine this is, in minutes.
    python -m linvideo_core.transfer --preset gpu
    python -m linvideo_core.transfer --model wan.safetensors --text-encoder umt5_xxl.safetensors
Wan 2.2's two experts are linearized together, the second being --low-noise-model. Repeating a
command continues where it stopped. The run folder holds config.json, metrics, checkpoints, the
result, linearized.safetensors, and the evidence: pictures and evaluation.json, which compare what
was saved with its teacher. What the teacher sampled lies beside it, in the folder `teacher`, and
serves every run with the same model, prompts, size and sampler.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.config import parse
from .config import TransferConfig

SHOWN = (
    "model",
    "low_noise_model",
    "prompts",
    "text_encoder",
    "num_frames",
    "height",
    "width",
    "guidance_scale",
    "shift",
    "num_trajectories",
    "target",
    "layers",
    "steps",
    "batch_size",
    "accumulation",
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

_HOME = {
    "out": Path("runs/home"),
    "frozen": "bf16",
    "activation_checkpointing": True,
    "guidance_scale": 5.0,
    "shard_size": 1,
    "steps": 3000,
    "evaluate_samples": 2,
    "evaluate_batch_size": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "num_trajectories": 24,
        "warm_start_steps": 40,
        "steps": 200,
        "batch_size": 6,
        "learning_rate": 2e-3,
        "layer_score_learning_rate": 0.03,
        "warmup_steps": 20,
        "ema_decay": 0.99,
        "checkpoint_every": 25,
        "log_every": 5,
    },
    # A small model keeps a GPU waiting for its kernels: a batch of 256 takes no longer than of 64.
    "gpu": {
        "out": Path("runs/transfer-gpu"),
        "num_trajectories": 2048,
        "shard_size": 256,
        "warm_start_steps": 300,
        "steps": 2500,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "layer_score_learning_rate": 0.01,
        "warmup_steps": 100,
        "ema_decay": 0.998,
        "compile": True,
        "checkpoint_every": 500,
        "log_every": 25,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
    # Wan 1.3B and 14B at 480p on one card of a home, see docs/home.md.
    "home-24gb": {**_HOME, "target": 16, "batch_size": 2, "accumulation": 2},
    "home-48gb": {**_HOME, "target": 22, "batch_size": 1, "accumulation": 4, "offload_blocks": 32},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run the transfer, say what was made."""
    config = parse(TransferConfig, argv, description=__doc__, presets=PRESETS, shown=SHOWN)
    # PyTorch is imported here, when it is needed.
    from .command import main as transfer

    transfer(config)
