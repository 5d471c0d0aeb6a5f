"""LinVideo Transfer Settings: what an expert may set of a transfer, else found out."""

from typing import Any

from comfy_api.latest import io

from ..linvideo_core.models.config import ATTENTION_MASSES
from ..linvideo_core.run import limits
from ..linvideo_core.run.limits import Limits
from ..linvideo_core.transfer.config import OBJECTIVES, PARAMETERS
from .schema import TransferSettings, checked, make_input, make_schema


class LinVideoTransferSettings(io.ComfyNode):
    """The settings of a transfer -> LINVIDEO_SETTINGS, a dict of them by name; 0 is auto."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoTransferSettings",
            display_name="LinVideo Transfer Settings",
            description="For experiments: what LinVideo Linearize's mode 'run the transfer now' "
            "otherwise finds out itself. Set what you want to decide and leave the rest at 0, "
            "which is auto.",
            search_aliases=["transfer settings", "training settings", "expert", "linvideo options"],
            inputs=[*_training(), *_videos(), *_weights(), *_tiles()],
            outputs=[
                TransferSettings.Output(
                    "settings", tooltip="For LinVideo Linearize in the mode 'run the transfer now'."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, **settings: Any) -> io.NodeOutput:
        """Pass the settings on by name."""
        return io.NodeOutput(settings)


def _auto(name: str, limits: Limits, tooltip: str, *, step: int = 1) -> io.Input:
    """Return the input of a whole number that is found out while it is 0."""
    settings = {"default": 0, "min": 0, "max": limits.high, "step": step}
    return make_input(io.Int, name, settings, f"{tooltip} 0 is auto.")


def _training() -> list[io.Input]:
    return [
        _auto(
            "target",
            limits.LAYERS,
            "How many layers become linear or hybrid; training finds out which. Auto is about half "
            "of the model's layers (Wan 1.3B: 16 of 30).",
        ),
        _auto("steps", limits.COUNT, "Training steps. Auto follows quality."),
        _auto(
            "batch_size",
            limits.COUNT,
            "Videos in a training step. The first to lower when memory runs out.",
        ),
        make_input(
            io.Float,
            "learning_rate",
            {"default": 0.0, "min": 0.0, "max": 1.0, "step": 1e-5, "round": False},
            "How far each step goes. Lower it when training fails. 0 is auto.",
        ),
        make_input(
            io.Float,
            "cfg",
            {"default": 0.0, "min": 0.0, "max": limits.GUIDANCE_SCALE.high, "step": 0.1},
            "The guidance that the model is used with: set the same in the sampler later. 0 is "
            "auto: what the model is usually sampled with.",
        ),
    ]


def _videos() -> list[io.Input]:
    # Frames come as 4 n + 1, which steps from 0 would never meet.
    sizes = [
        _auto(
            name,
            limit,
            f"The {name} of the videos to learn from, while no latent is connected. Lower it when "
            "memory runs out.",
            step=step,
        )
        for name, limit, step in (
            ("width", limits.PIXELS, 16),
            ("height", limits.PIXELS, 16),
            ("frames", limits.FRAMES, 1),
        )
    ]
    return [
        _auto(
            "sampler_steps",
            limits.SAMPLER_STEPS,
            "Steps in which the original model makes each video to learn from, at least 8.",
        ),
        _auto(
            "num_videos",
            limits.VIDEOS,
            "Videos that the original model makes first and keeps on disk, to learn from. Auto, "
            "for a model of your own: none; it makes new ones all the while, and keeps nothing.",
        ),
        _auto(
            "warm_start_steps",
            limits.COUNT_OR_NONE,
            "Short steps before the training, which bring the linear attention close to the "
            "original one.",
        ),
        *sizes,
    ]


def _weights() -> list[io.Input]:
    return [
        make_input(
            io.Combo,
            "parameters",
            {"options": ["lora", *(x for x in PARAMETERS if x != "lora")], "default": "lora"},
            "What may be changed beside the linear attention itself. lora: a small addition to the "
            "weights. full: the weights themselves, which takes much more memory. feature_maps: "
            "nothing else.",
        ),
        _auto(
            "lora_rank",
            limits.LORA_RANK,
            "How much the addition can hold (lora only). Lower takes less memory.",
        ),
        make_input(
            io.Combo,
            "objective",
            {"options": list(OBJECTIVES), "default": "velocity"},
            "Where the linear model is compared with the original. velocity: where the original's "
            "videos lead. adm: also where its own lead, as published; a step takes longer.",
        ),
        make_input(
            io.Int,
            "seed",
            {"default": 0, "min": 0, "max": 2**53, "control_after_generate": False},
            "Decides everything random: the same seed gives the same result.",
        ),
    ]


def _tiles() -> list[io.Input]:
    return [
        make_input(
            io.String,
            "tile",
            {"default": "", "optional": True},
            "Makes the chosen layers hybrid: softmax attention within tiles of frames x height x "
            "width tokens, such as 3x15x14 (0 is all of an axis), linear attention beyond. Slower "
            "than linear layers and closer to the original. Empty is auto: a quarter of the video "
            "along each axis, linear layers for the demo model. none: linear layers.",
        ),
        make_input(
            io.Combo,
            "attention_mass",
            {"options": list(ATTENTION_MASSES), "default": "query", "optional": True},
            "With tile: what tells how much attention lies beyond a token's tile, its query or the "
            "mean and spread of all keys.",
        ),
    ]
