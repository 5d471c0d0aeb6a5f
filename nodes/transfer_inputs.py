"""The inputs of LinVideo Linearize's mode that runs the transfer."""

from comfy_api.latest import io

from ..linvideo_core.objectives import OBJECTIVES
from ..linvideo_core.student import PARAMETERS
from .schema import make_input


def transfer_inputs() -> list[io.Input]:
    """Return the inputs, the essential ones first; the defaults suit LinVideo Demo on a CPU."""
    return [*_essentials(), *_sockets(), *_training(), *_teacher(), *_size(), *_prompts()]


def _essentials() -> list[io.Input]:
    return [
        make_input(
            io.String,
            "name",
            default="my transfer",
            tooltip="What the result is called: it is saved under this name in models/linvideo. "
            "Stopped? Queue the same name with the same settings and it continues.",
        ),
        make_input(
            io.Int,
            "target",
            default=5,
            min=1,
            max=1000,
            tooltip="How many layers become fast; training finds out which. About half of the "
            "model's layers is a good start (Wan 1.3B: 16 of 30).",
        ),
        make_input(
            io.Int,
            "steps",
            default=200,
            min=1,
            max=1_000_000,
            tooltip="Training steps. More steps look better and take longer.",
        ),
        make_input(
            io.Int,
            "batch_size",
            default=6,
            min=1,
            max=4096,
            tooltip="Videos per training step. The first thing to lower when memory runs out.",
        ),
        make_input(
            io.Float,
            "cfg",
            default=3.0,
            min=1.0,
            max=100.0,
            step=0.1,
            tooltip="The guidance that the model is used with. Set the same in the sampler later.",
        ),
        make_input(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            tooltip="Decides everything random. The same seed gives the same result.",
        ),
    ]


def _sockets() -> list[io.Input]:
    return [
        make_input(
            io.Conditioning,
            "positive",
            optional=True,
            tooltip="The prompts to learn with: combine several, the more different the better, or "
            "list them in 'prompts' below. Leave both empty for LinVideo Demo's model, which then "
            "learns with all of its prompts.",
        ),
        make_input(
            io.Conditioning,
            "negative",
            optional=True,
            tooltip="The negative prompt that you will sample with. Leave it open for LinVideo "
            "Demo's model.",
        ),
        make_input(
            io.Latent,
            "latent",
            optional=True,
            tooltip="An empty latent of the video's size. Leave it open to use width, height and "
            "frames, or for LinVideo Demo's model, which has one size.",
        ),
    ]


def _training() -> list[io.Input]:
    return [
        make_input(
            io.Combo,
            "parameters",
            options=list(PARAMETERS),
            default="lora",
            advanced=True,
            tooltip="What may be changed beside the fast attention itself. lora: a small addition "
            "to the weights. full: the weights themselves, which takes much more memory. "
            "feature_maps: nothing else.",
        ),
        make_input(
            io.Int,
            "lora_rank",
            default=32,
            min=1,
            max=4096,
            advanced=True,
            tooltip="How much the addition can hold (lora only). Lower takes less memory.",
        ),
        make_input(
            io.Combo,
            "objective",
            options=list(OBJECTIVES),
            default="adm",
            advanced=True,
            tooltip="What is compared with the original model. adm follows the fast model where it "
            "really goes and is the best; the others are for experiments.",
        ),
        make_input(
            io.Float,
            "learning_rate",
            default=0.002,
            min=1e-7,
            max=1.0,
            step=1e-5,
            round=False,
            advanced=True,
            tooltip="How far each step goes. 0.002 suits LinVideo Demo; for large models start at "
            "0.0001. Lower it when training fails.",
        ),
        make_input(
            io.Int,
            "warm_start_steps",
            default=40,
            min=0,
            max=100_000,
            advanced=True,
            tooltip="Short steps before the training, which bring the fast attention close to the "
            "original one.",
        ),
    ]


def _teacher() -> list[io.Input]:
    return [
        make_input(
            io.Int,
            "num_videos",
            default=24,
            min=1,
            max=1_000_000,
            advanced=True,
            tooltip="Videos that the original model makes first, to learn from.",
        ),
        make_input(
            io.Int,
            "sampler_steps",
            default=50,
            min=8,
            max=1000,
            advanced=True,
            tooltip="Steps in which the original model makes each of them.",
        ),
    ]


def _size() -> list[io.Input]:
    sizes = {"width": (832, 16, 16), "height": (480, 16, 16), "frames": (81, 1, 4)}
    return [
        make_input(
            io.Int,
            name,
            default=default,
            min=low,
            max=16384,
            step=step,
            advanced=True,
            tooltip=f"The video's {name} while no latent is connected. Lower it when memory runs "
            "out. LinVideo Demo's model has its own.",
        )
        for name, (default, low, step) in sizes.items()
    ]


def _prompts() -> list[io.Input]:
    return [
        make_input(
            io.Clip,
            "clip",
            optional=True,
            tooltip="The text encoder for the list of prompts. LinVideo Demo's model needs none.",
        ),
        # Optional, which comes last: workflows that were saved without it keep their values.
        make_input(
            io.String,
            "prompts",
            default="",
            multiline=True,
            optional=True,
            placeholder="prompts to learn with, one a line, instead of positive",
            tooltip="The prompts to learn with, one a line, in place of positive. What negative "
            "brings beside its prompt, such as a start image, then goes with each of them.",
        ),
    ]
