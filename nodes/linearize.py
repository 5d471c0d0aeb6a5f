"""LinVideo Linearize: make a video model's chosen layers linear."""

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..linvideo_core import artifact
from .model_folder import find_file, fingerprint, list_files, show_summary
from .patching.apply import linearize
from .patching.injection import KEY
from .schema import LinVideo, make_input, make_schema
from .transfer.guidance import find_guidance
from .transfer.inputs import read_transfer_inputs, transfer_inputs

APPLY = "apply a saved file"
APPLY_INPUT = "apply a connected LINVIDEO"
TRANSFER = "run the transfer now"

_MADE: dict[str, Path] = {}
"""The files that were made since ComfyUI started, by the names of their transfers."""


def _inputs(source: io.Input) -> list[io.Input]:
    return [
        source,
        make_input(
            io.Float,
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            advanced=True,
            tooltip="How strongly the file changes the model's weights. Leave it at 1: the fast "
            "layers were trained together with these changes.",
        ),
        _keep_first_steps_input(),
    ]


def _keep_first_steps_input() -> io.Input:
    """Return the input that is the same in every mode."""
    return make_input(
        io.Int,
        "keep_first_steps",
        default=0,
        min=0,
        max=1000,
        advanced=True,
        tooltip="So many first steps of each sampler run the model as it came in, without the "
        "file: slower, and closer to the original model's video. Needs a file trained with LoRA.",
    )


def _options() -> list[io.DynamicCombo.Option]:
    file = io.Combo.Input(
        "file",
        options=list_files(),
        tooltip="Which LinVideo file to apply. It must be made for this model. Put your own into "
        "models/linvideo.",
    )
    linvideo = LinVideo.Input(
        "linvideo", tooltip="What to apply: LINVIDEO of another node. It must fit this model."
    )
    return [
        io.DynamicCombo.Option(APPLY, _inputs(file)),
        io.DynamicCombo.Option(APPLY_INPUT, _inputs(linvideo)),
        io.DynamicCombo.Option(TRANSFER, [*transfer_inputs(), _keep_first_steps_input()]),
    ]


class LinVideoLinearize(io.ComfyNode):
    """MODEL -> the same model with some layers' attention made linear, and the file's content."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
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
                    options=_options(),
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
    def fingerprint_inputs(cls, mode: dict[str, Any], **_: Any) -> str:
        """Run again when the file was replaced by another of the same name, or is gone."""
        if mode["mode"] == APPLY:
            return fingerprint(mode["file"])
        made = _MADE.get(mode.get("name"))
        return "deleted" if made is not None and not made.exists() else ""

    @classmethod
    def execute(cls, model: Any, mode: dict[str, Any]) -> io.NodeOutput:
        """Apply the chosen file, the connected one, or one made now, to a clone of the model."""
        hidden = cls.hidden
        guidance_scale = hidden and find_guidance(hidden.prompt, hidden.unique_id)
        applied = _find_artifact(model, mode, guidance_scale)
        strength = mode.get("strength", 1.0)
        settings = {"strength": strength, "keep_first_steps": mode["keep_first_steps"]}
        node_id = hidden and hidden.unique_id
        linearized = linearize(model, applied, **settings, node_id=node_id)
        note = f"applied to {type(model.model).__name__} at strength {strength:g}"
        report = linearized.get_attachment(KEY).report
        report.show()
        found = report.text.splitlines()[1:]
        picture = show_summary(applied, note="\n".join([note, *found]))
        return io.NodeOutput(linearized, applied, picture, ui=ui.PreviewText(report.text))


def _find_artifact(
    model: Any, mode: dict[str, Any], guidance_scale: float | None
) -> artifact.Artifact:
    if mode["mode"] == APPLY_INPUT:
        return mode["linvideo"]
    if mode["mode"] == APPLY:
        return artifact.load(find_file(mode["file"]))
    # On use: what trains and draws takes a second to import.
    from .transfer.pipeline import run

    made = _MADE[mode["name"]] = run(model, read_transfer_inputs(mode), guidance_scale)
    return artifact.load(made)
