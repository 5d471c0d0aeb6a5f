"""LinVideo Linearize: make a video model's chosen layers linear."""

from typing import Any

from comfy_api.latest import io

from ..linvideo_core import artifact
from .files import find_file, list_files
from .first_steps import keep_first_steps_input
from .patching import linearize
from .schema import LinVideo, make_schema

APPLY = "apply a saved file"


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "file",
            options=list_files(),
            tooltip="Which LinVideo file to apply. It must be made for this model. Put your own "
            "into models/linvideo.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How strongly the file changes the model's weights. Leave it at 1: the fast "
            "layers were trained together with these changes.",
        ),
        keep_first_steps_input(),
    ]


class LinVideoLinearize(io.ComfyNode):
    """MODEL -> the same model with some layers' attention made linear, and the file's content."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return make_schema(
            node_id="LinVideoLinearize",
            display_name="LinVideo Linearize",
            description="Makes a video model faster: the attention of chosen layers is replaced by "
            "linear attention, whose cost grows with the video's length and not with its square. "
            "LoRAs and other model nodes can stand before or after it.",
            search_aliases=["linear attention", "speed up", "faster", "attention", "linearize"],
            inputs=[
                io.Model.Input("model", tooltip="The video model to make faster, such as Wan 2.1."),
                io.DynamicCombo.Input(
                    "mode",
                    options=[io.DynamicCombo.Option(APPLY, _inputs())],
                    tooltip="Where the fast layers come from.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The faster model; the one put in is unchanged."),
                LinVideo.Output("LINVIDEO", tooltip="The file's content, for LinVideo's nodes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, mode: dict[str, Any], **_: Any) -> str:
        """Run again when the file was replaced by another of the same name."""
        status = find_file(mode["file"]).stat()
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, model: Any, mode: dict[str, Any]) -> io.NodeOutput:
        """Load the file and apply it to a clone of the model."""
        loaded = artifact.load(find_file(mode["file"]))
        settings = {"keep_first_steps": mode["keep_first_steps"]}
        return io.NodeOutput(
            linearize(model, loaded, strength=mode["strength"], **settings), loaded
        )
