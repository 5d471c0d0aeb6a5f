"""LinVideo Linearize: make a video model's chosen layers linear."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..linvideo_core import artifact
from ..linvideo_core.transfer.config import QUALITIES
from .model_folder import find_file, fingerprint, list_files, show_summary
from .patching.apply import linearize
from .patching.injection import KEY
from .schema import LinVideo, TransferSettings, checked, make_input, make_schema

APPLY = "apply a saved file"
APPLY_INPUT = "apply a connected LINVIDEO"
TRANSFER = "run the transfer now"

_SOCKETS = {
    "positive": (
        io.Conditioning,
        "The prompts to learn with, in place of the list: combine several, the more different the "
        "better.",
    ),
    "negative": (
        io.Conditioning,
        "The negative prompt that you will sample with. Leave it open for LinVideo Demo's model.",
    ),
    "clip": (
        io.Clip,
        "The text encoder for the list of prompts. LinVideo Demo's model needs none.",
    ),
    "latent": (
        io.Latent,
        "An empty latent of the size and length that you will sample. Left open, the model's usual "
        "size is taken.",
    ),
    "settings": (
        TransferSettings,
        "LinVideo Transfer Settings, for experiments. Left open, everything suits the connected "
        "model.",
    ),
}
"""What may be connected for a transfer: type and tooltip."""

_MOST_NODES = 100
_MADE: dict[str, Path] = {}
"""The files that were made since ComfyUI started, by the names of their transfers."""


class LinVideoLinearize(io.ComfyNode):
    """MODEL -> the same model with some layers' attention made linear, and the file's content."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideo",
            display_name="LinVideo Linearize",
            description="Makes a video model faster: the attention of chosen layers is replaced by "
            "linear attention, whose cost grows with the video's length and not with its square. "
            "LoRAs and other model nodes can stand before or after it.",
            search_aliases=[
                "speed up wan",
                "faster wan",
                "sage attention",
                "teacache",
                "linear attention",
                "attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The video model to make faster, such as Wan 2.1."),
                io.DynamicCombo.Input(
                    "mode",
                    options=_modes(),
                    tooltip="Where the fast layers come from: a file, or a training here and now "
                    "that makes the file.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                io.Model.Output("MODEL", tooltip="The faster model; the one put in is unchanged."),
                LinVideo.Output("LINVIDEO", tooltip="The file's content, for LinVideo's nodes."),
                io.Image.Output("report", tooltip="A picture of what was applied, and to what."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, mode: dict[str, Any] | None = None, **_: Any) -> str:
        """Run again when the file was replaced by another of the same name, or is gone."""
        if mode is None:
            return ""
        if mode["mode"] == APPLY:
            return fingerprint(mode["file"])
        made = _MADE.get(mode.get("name"))
        return "deleted" if made is not None and not made.exists() else ""

    @classmethod
    @checked
    def execute(cls, model: Any, mode: dict[str, Any] | None = None) -> io.NodeOutput:
        """Apply the chosen file, the connected one, or one made now, to a clone of the model."""
        node_id = cls.hidden and cls.hidden.unique_id
        if mode["mode"] == APPLY_INPUT:
            applied = mode["linvideo"]
        elif mode["mode"] == APPLY:
            applied = artifact.load(find_file(mode["file"]))
        else:
            # On use: what trains and draws takes a second to import.
            from .transfer.pipeline import run

            guidance_scale = cls.hidden and find_guidance(cls.hidden.prompt, node_id)
            made = _MADE[mode["name"]] = run(model, read_transfer_inputs(mode), guidance_scale)
            applied = artifact.load(made)
        strength = mode.get("strength", 1.0)
        settings = {"strength": strength, "keep_first_steps": mode["keep_first_steps"]}
        linearized = linearize(model, applied, **settings, node_id=node_id)
        note = f"applied to {type(model.model).__name__} at strength {strength:g}"
        report = linearized.get_attachment(KEY)
        report.show()
        found = report.text.splitlines()[1:]
        picture = show_summary(applied, note="\n".join([note, *found]))
        return io.NodeOutput(linearized, applied, picture, ui=ui.PreviewText(report.text))


def read_transfer_inputs(mode: dict[str, Any]) -> dict[str, Any]:
    """Return what a transfer is run with, by name: None for a socket that nothing is connected to.

    `settings` is what LinVideo Transfer Settings gives: by name, 0 where the transfer shall find
    the value itself.
    """
    return {**dict.fromkeys(_SOCKETS), **{key: mode[key] for key in mode if key != "mode"}}


def find_guidance(prompt: Mapping[str, Any] | None, node_id: str | None) -> float | None:
    """Return the cfg of the sampler that a node's MODEL goes to, None where it cannot be told.

    prompt: the graph in ComfyUI's API format: a transfer runs before the sampler. A cfg that
    another node computes is not known beforehand, nor one of several samplers that differ.
    """
    found = {
        float(node["inputs"]["cfg"])
        for node in _followers(prompt or {}, str(node_id))
        if isinstance(node["inputs"].get("cfg"), int | float)
    }
    return found.pop() if len(found) == 1 else None


def _followers(prompt: Mapping[str, Any], node_id: str) -> Iterator[Mapping[str, Any]]:
    """Give every node that a node's MODEL reaches, through others that pass models on."""
    reached, waiting = {node_id}, [node_id]
    while waiting and len(reached) < _MOST_NODES:
        # Of a node's outputs the MODEL, or guider, is the first.
        source = [waiting.pop(), 0]
        for other_id, node in prompt.items():
            inputs = node.get("inputs", {})
            is_fed = source in (inputs.get("model"), inputs.get("guider"))
            if is_fed and other_id not in reached:
                reached.add(other_id)
                waiting.append(other_id)
                yield node


def _modes() -> list[io.DynamicCombo.Option]:
    file = io.Combo.Input(
        "file",
        options=list_files(),
        tooltip="Which LinVideo file to apply. It must be made for this model. Put your own into "
        "models/linvideo.",
    )
    linvideo = LinVideo.Input(
        "linvideo", tooltip="What to apply: LINVIDEO of another node. It must fit this model."
    )
    strength = make_input(
        io.Float,
        "strength",
        {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "advanced": True},
        "How strongly the file changes the model's weights. Leave it at 1: the fast layers were "
        "trained together with these changes.",
    )
    keep_first_steps = make_input(
        io.Int,
        "keep_first_steps",
        {"default": 0, "min": 0, "max": 1000, "advanced": True},
        "So many first steps of each sampler run the model as it came in, without the file: "
        "slower, and closer to the original model's video: on a test model 0.57 times as far from "
        "it with 4 of 20 steps, a third with 8. Needs a file trained with LoRA.",
    )
    return [
        io.DynamicCombo.Option(APPLY, [file, strength, keep_first_steps]),
        io.DynamicCombo.Option(APPLY_INPUT, [linvideo, strength, keep_first_steps]),
        io.DynamicCombo.Option(TRANSFER, [*_transfer_inputs(), keep_first_steps]),
    ]


def _transfer_inputs() -> list[io.Input]:
    return [
        make_input(
            io.String,
            "name",
            {"default": "my transfer"},
            "What the result is called: it is saved under this name in models/linvideo. Stopped? "
            "Queue the same name with the same inputs and it continues.",
        ),
        make_input(
            io.Combo,
            "quality",
            {"options": list(QUALITIES), "default": "standard"},
            "How long it may train. draft: to see that it works. standard: to use the result. "
            "best: where time does not matter.",
        ),
        make_input(
            io.String,
            "prompts",
            {"default": "", "multiline": True, "placeholder": "prompts to learn with, one a line"},
            "The prompts to learn with, one a line, the more different the better; connect clip. "
            "Left empty with clip connected, prompts that come with LinVideo are learned with; or "
            "connect positive instead of clip. What negative brings beside its prompt, such as a "
            "start image, goes with each of them. LinVideo Demo's model needs neither: it then "
            "learns with all of its prompts.",
        ),
        *(
            make_input(kind, name, {"optional": True}, tooltip)
            for name, (kind, tooltip) in _SOCKETS.items()
        ),
    ]
