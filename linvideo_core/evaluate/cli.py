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
With `--kernels` it says how far kernels of softmax layers lead from the dense videos, alone and,
where there is a file, beside its linear layers.
    python -m linvideo_core.evaluate --kernels sparse:0.3,sparse:0.1
With `--vae`, Wan's autoencoder, videos are measured and shown decoded, in colour; without it a
Wan's are the mean of its latents' channels.
The folder `--out` then holds evaluation.json, samples.png, samples.gif (samples.mp4 of decoded
videos), velocity_error.png and a model card, with `--distilled` also steps.png.
With `--export-videos` videos of every prompt are written instead, named as VBench wants them.
    python -m linvideo_core.evaluate --model wan.safetensors --vae wan_2.1_vae.safetensors \
        --prompts all_dimension.txt --text-encoder umt5.safetensors --batch-size 1 \
        --artifact linearized.safetensors --seeds-per-prompt 5 --export-videos runs/vbench
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..run.config import parse, say_that_pytorch_loads
from ..teacher.config import check_embedded
from .config import EvaluateConfig

SHOWN = (
    "model",
    "prompts",
    "artifact",
    "distilled",
    "lora",
    "kernels",
    "dense_share",
    "vae",
    "export_videos",
    "num_frames",
    "height",
    "width",
    "num_samples",
    "seeds_per_prompt",
    "sampler_steps",
    "guidance_scale",
    "shift",
    "batch_size",
    "out",
    "seed",
    "device",
)
"""The settings that `--help` shows."""

_AS_MADE = ("width", "height", "num_frames", "guidance_scale", "shift")

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "full": {"num_samples": 1000, "batch_size": 250, "out": Path("runs/evaluate-full")},
}


def find_settings(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow from the preset and, with a model, from the file made for it.

    Both are sampled at the size, guidance, shift and steps that the file says it was made at.
    given: the flags by the names of `EvaluateConfig`'s fields.

    Raises ValueError, in one sentence, for a file that cannot be read.
    """
    values = dict(PRESETS[preset])
    if given.get("model") is None:
        check_embedded(given)
        return values
    if given.get("artifact") is None:
        return values
    # PyTorch is imported here, when it is needed.
    from .compare import load_linearized

    usage = load_linearized(given["artifact"]).header.usage
    said = {name: x for name, x in usage.said.items() if name in _AS_MADE}
    if usage.steps and usage.sampler == "euler":
        said["sampler_steps"] = usage.steps
    return values | said


def read(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Return the settings that a command line stands for."""
    how = {"presets": PRESETS, "settings": find_settings, "shown": SHOWN}
    return parse(EvaluateConfig, argv, description=__doc__, **how)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare, show the table."""
    config = read(argv)
    say_that_pytorch_loads()
    # PyTorch is imported here, when it is needed.
    from .command import main as compare

    compare(config)
