"""Distil a linearized model to a few steps: `python -m linvideo_core.distill`.

Without arguments the embedded model's own file is distilled on whatever machine this is.
    python -m linvideo_core.distill --preset gpu
    python -m linvideo_core.distill --model wan.safetensors --prompts prompts.safetensors \\
        --artifact linearized.safetensors
A model of one's own decides the settings by its size, the graphics card how it fits, and
`--quality` how long it learns; what other flags say goes before.
Repeating a command continues where it stopped. The run folder holds config.json, metrics,
checkpoints, the result, distilled.safetensors, and the evidence: pictures and evaluation.json,
which compare steps against quality. The teacher's videos lie beside it, as those that `transfer`
stores.
"""

from collections.abc import Sequence

from ..run.config import parse, say_that_pytorch_loads
from ..transfer.recipe import HELP_NOTE
from .config import DistillConfig
from .recipe import PRESETS, find_settings

SHOWN = (
    "model",
    "prompts",
    "text_encoder",
    "artifact",
    "quality",
    "card",
    "num_frames",
    "height",
    "width",
    "guidance_scale",
    "real_guidance_scale",
    "regression_weight",
    "shift",
    "num_trajectories",
    "num_steps",
    "steps",
    "batch_size",
    "accumulation",
    "learning_rate",
    "lora_rank",
    "frozen",
    "offload_blocks",
    "activation_checkpointing",
    "evaluate_samples",
    "vae",
    "out",
    "seed",
    "device",
)
"""The settings that `--help` shows."""


def read(argv: Sequence[str] | None = None) -> DistillConfig:
    """Return the settings that a command line stands for."""
    how = {"presets": PRESETS, "settings": find_settings, "shown": SHOWN}
    description = f"{__doc__.splitlines()[0]} {HELP_NOTE}"
    return parse(DistillConfig, argv, description=description, **how)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, distil, say what was made."""
    config = read(argv)
    say_that_pytorch_loads()
    # PyTorch is imported here, when it is needed.
    from .command import main as distil

    distil(config)
