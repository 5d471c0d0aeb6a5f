"""Compare a linearized model with its teacher: `python -m linvideo_core.evaluate`.

Three models sample the same prompts from the same noise: the teacher, the teacher with the chosen
layers merely swapped for untrained linear attention, and the student.
    python -m linvideo_core.evaluate                                  # minutes on a laptop
    python -m linvideo_core.evaluate --preset full                    # a GPU
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors
With `--distilled` it compares steps against quality: the teacher and the linearized model by Euler
at all steps and at few, the distilled ones at their own.
    python -m linvideo_core.evaluate --distilled runs/distill/distilled.safetensors
A few-step LoRA of others is compared the same way, on the teacher and on the linearized model.
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors --lora few_step_lora.safetensors --shift 5
The folder `--out` then holds evaluation.json, samples.png, samples.gif and velocity_error.png, with
`--distilled` also steps.png.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.config import parse
from .config import EvaluateConfig

SHOWN = (
    "model",
    "prompts",
    "artifact",
    "distilled",
    "lora",
    "num_frames",
    "height",
    "width",
    "num_samples",
    "sampler_steps",
    "guidance_scale",
    "shift",
    "batch_size",
    "out",
    "seed",
    "device",
)
"""The settings that `--help` shows."""

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "full": {"num_samples": 1000, "batch_size": 250, "out": Path("runs/evaluate-full")},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare, show the table."""
    config = parse(EvaluateConfig, argv, description=__doc__, presets=PRESETS, shown=SHOWN)
    # PyTorch is imported here, when it is needed.
    from .command import main as compare

    compare(config)
