"""The inputs of LinVideo Linearize's mode that runs the transfer: few, the rest is found out."""

from typing import Any

from comfy_api.latest import io

from ...linvideo_core.transfer.quality import QUALITIES
from ..schema import TransferSettings, make_input

_SOCKETS = ("positive", "negative", "clip", "latent", "settings")


def transfer_inputs() -> list[io.Input]:
    """Return the inputs, the essential ones first."""
    return [*_essentials(), *_sockets()]


def read_transfer_inputs(mode: dict[str, Any]) -> dict[str, Any]:
    """Return what a transfer is run with, by name: None for a socket that nothing is connected to.

    `settings` is what LinVideo Transfer Settings gives: by name, 0 where the transfer shall find
    the value itself.
    """
    return {**dict.fromkeys(_SOCKETS), **{key: mode[key] for key in mode if key != "mode"}}


def _essentials() -> list[io.Input]:
    return [
        make_input(
            io.String,
            "name",
            default="my transfer",
            tooltip="What the result is called: it is saved under this name in models/linvideo. "
            "Stopped? Queue the same name with the same inputs and it continues.",
        ),
        make_input(
            io.Combo,
            "quality",
            options=list(QUALITIES),
            default="standard",
            tooltip="How long it may train. draft: to see that it works. standard: to use the "
            "result. best: where time does not matter.",
        ),
        make_input(
            io.String,
            "prompts",
            default="",
            multiline=True,
            placeholder="prompts to learn with, one a line",
            tooltip="The prompts to learn with, one a line, the more different the better; connect "
            "clip. Left empty with clip connected, prompts that come with LinVideo are learned "
            "with; or connect positive instead of clip. What negative brings beside its "
            "prompt, such as a start image, goes with each of them. LinVideo Demo's model needs "
            "neither: it then learns with all of its prompts.",
        ),
    ]


def _sockets() -> list[io.Input]:
    return [
        make_input(
            io.Conditioning,
            "positive",
            optional=True,
            tooltip="The prompts to learn with, in place of the list: combine several, the more "
            "different the better.",
        ),
        make_input(
            io.Conditioning,
            "negative",
            optional=True,
            tooltip="The negative prompt that you will sample with. Leave it open for LinVideo "
            "Demo's model.",
        ),
        make_input(
            io.Clip,
            "clip",
            optional=True,
            tooltip="The text encoder for the list of prompts. LinVideo Demo's model needs none.",
        ),
        make_input(
            io.Latent,
            "latent",
            optional=True,
            tooltip="An empty latent of the size and length that you will sample. Left open, the "
            "model's usual size is taken.",
        ),
        make_input(
            TransferSettings,
            "settings",
            optional=True,
            tooltip="LinVideo Transfer Settings, for experiments. Left open, everything suits the "
            "connected model.",
        ),
    ]
