"""Linearize a video model: `python -m linvideo_core.transfer`.

Without arguments the embedded model is linearized on whatever machine this is, in minutes.
    python -m linvideo_core.transfer --preset gpu
    python -m linvideo_core.transfer --model wan.safetensors --text-encoder umt5_xxl.safetensors
A model of one's own decides the settings by its size, the graphics card how it fits, and
`--quality` how long it learns; what other flags say goes before. `--estimate` tells beforehand
what each quality takes on this machine.
Wan 2.2's two experts are linearized together, the second being --low-noise-model. Repeating a
command continues where it stopped. The run folder holds config.json, metrics, checkpoints, the
result, linearized.safetensors, and the evidence: pictures and evaluation.json, which compare what
was saved with its teacher. Videos that are stored (`--states stored`) lie beside it, in the folder
`teacher`, and serve every run with the same model, prompts, size and sampler.
"""

import os
import sys
from collections.abc import Sequence

from ..run.config import parse, say_that_pytorch_loads
from ..run.errors import SettingError
from .config import QUALITIES, TransferConfig
from .recipe import HELP_NOTE, PRESETS, find_settings

SHOWN = (
    "model",
    "low_noise_model",
    "prompts",
    "text_encoder",
    "quality",
    "card",
    "estimate",
    "num_frames",
    "height",
    "width",
    "more_sizes",
    "guidance_scale",
    "shift",
    "num_trajectories",
    "target",
    "layers",
    "tile",
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


def read(argv: Sequence[str] | None = None) -> TransferConfig:
    """Return the settings that a command line stands for."""
    how = {"presets": PRESETS, "settings": find_settings, "shown": SHOWN}
    description = f"{__doc__.splitlines()[0]} {HELP_NOTE}"
    return parse(TransferConfig, argv, description=description, **how)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run the transfer, say what was made."""
    config = read(argv)
    say_that_pytorch_loads()
    # PyTorch is imported here, when it is needed.
    from . import command

    if not config.estimate:
        command.main(config)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError(
            "{estimate} was given to several processes; it measures one: start it without torchrun",
            "estimate",
        )
    given = sys.argv[1:] if argv is None else argv
    command.main_estimate({name: read([*given, "--quality", name]) for name in QUALITIES})
