"""LinVideo Few-Step Sampler and Few-Step Sigmas: ComfyUI's own `lcm`, rightly set.

A distilled model knows the noise levels that it was trained at and no others. They come from the
LINVIDEO file that the MODEL was linearized with, so they cannot be mistaken.
"""

from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import SamplerCustom
from torch import Tensor

from ..linvideo_core.artifact import Artifact
from .patching.injection import KEY
from .schema import LinVideo, checked, make_schema

_SAMPLER = "lcm"
_STEPS_TOOLTIP = (
    "How many steps. A model linearized with a distilled file takes the steps that it was trained "
    "for: their number, or 0 for just those; any other number is refused. For every other model "
    "they are spread as ComfyUI's simple scheduler does, by the model's own shift."
)


def make_sigmas(source: Any, steps: int) -> Tensor:
    """Return the noise levels [steps + 1] fp32 of a ModelPatcher or an Artifact, falling to 0.

    steps: 0 for those of a distilled file.

    Raises ValueError when a distilled model has another number of steps, or when
    there is nothing that says the noise levels.
    """
    # A file, or the report on a MODEL to which one was applied.
    applied = source if isinstance(source, Artifact) else source.get_attachment(KEY)
    header = None if applied is None else applied.header
    if header is not None and header.sigmas:
        trained = len(header.sigmas) - 1
        if steps not in (0, trained):
            raise ValueError(
                f"steps is {steps}, but this model was distilled for {trained}: set steps to "
                f"{trained}, or to 0"
            )
        return torch.tensor(header.sigmas, dtype=torch.float32)
    if isinstance(source, Artifact):
        raise ValueError(
            "this LINVIDEO was not distilled for few steps, so it names none: connect the MODEL "
            "instead"
        )
    if steps == 0:
        raise ValueError(
            "steps is 0, but this model was not linearized with a distilled file: set steps, such "
            "as to 4"
        )
    sampling = source.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps).cpu()


def _steps_input() -> io.Input:
    return io.Int.Input("steps", default=4, min=0, max=100, tooltip=_STEPS_TOOLTIP)


class LinVideoFewStepSampler(io.ComfyNode):
    """MODEL, prompt and latents -> sampled latents, in a few steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoFewStepSampler",
            display_name="LinVideo Few-Step Sampler",
            description="Samples a model that was distilled for few steps, at the very noise "
            "levels that its LinVideo file names, with ComfyUI's lcm sampler.",
            search_aliases=["few step", "4 steps", "lcm", "distilled", "dmd", "ksampler", "fast"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample, from LinVideo Linearize."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input("latent_image", tooltip="Empty latents of the video's size."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Decides the noise: the same seed makes the same video.",
                ),
                _steps_input(),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Leave it at 1 for a distilled model: guidance is trained into it. "
                    "Any other value needs a negative prompt and twice the time.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid; unused while cfg is 1."
                ),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The sampled video, to be decoded.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        negative: Any = None,
    ) -> io.NodeOutput:
        """Hand the file's noise levels and lcm to ComfyUI's own custom sampler."""
        if negative is None and cfg != 1:
            raise ValueError(
                f"cfg is {cfg:g} and there is no negative prompt: connect one, or set cfg to 1"
            )
        sigmas, sampler = make_sigmas(model, steps), comfy.samplers.ksampler(_SAMPLER)
        prompts = (positive, negative or [])
        sampled = SamplerCustom.execute(
            model, True, seed, cfg, *prompts, sampler, sigmas, latent_image
        )
        return io.NodeOutput(sampled.result[0])


class LinVideoFewStepSigmas(io.ComfyNode):
    """MODEL or LINVIDEO -> what ComfyUI's own custom samplers need to sample it in a few steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoFewStepSigmas",
            display_name="LinVideo Few-Step Sigmas",
            description="Gives the noise levels and the sampler of a model that was distilled for "
            "few steps, for ComfyUI's SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["few step", "4 steps", "lcm", "sigmas", "scheduler", "distilled"],
            inputs=[
                io.MultiType.Input(
                    "source",
                    types=[io.Model, LinVideo],
                    tooltip="The MODEL that will be sampled, or the LINVIDEO of a distilled file.",
                ),
                _steps_input(),
            ],
            outputs=[
                io.Sigmas.Output("SIGMAS", tooltip="The noise levels, for the sampler."),
                io.Sampler.Output("SAMPLER", tooltip="ComfyUI's lcm sampler."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, source: Any, steps: int) -> io.NodeOutput:
        """Look the noise levels up and name the sampler."""
        return io.NodeOutput(make_sigmas(source, steps), comfy.samplers.ksampler(_SAMPLER))
