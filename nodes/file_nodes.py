"""LinVideo Save, Load and Show File: LINVIDEO files on disk and in a picture."""

from comfy_api.latest import io, ui

from ..linvideo_core import artifact
from ..linvideo_core.artifact import Artifact
from ..linvideo_core.artifact.summary import describe
from .model_folder import (
    FOLDER,
    choose_path,
    find_file,
    fingerprint,
    list_files,
    show_summary,
    shown_name,
)
from .schema import LinVideo, make_schema


class LinVideoSave(io.ComfyNode):
    """LINVIDEO -> a file in models/linvideo."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoSave",
            display_name="LinVideo Save",
            description=f"Saves what makes a model linear as a file in models/{FOLDER}, where "
            "LinVideo Load and LinVideo Linearize find it.",
            search_aliases=["save linvideo", "save file", "export", "linear attention"],
            is_output_node=True,
            inputs=[
                LinVideo.Input("linvideo", tooltip="What to save: LINVIDEO of another node."),
                io.String.Input(
                    "filename",
                    default="my_model",
                    tooltip=f"The file's name; folders/in/between are made in models/{FOLDER}.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: if the name is taken, a number is added to it. On: the file of "
                    "that name is replaced.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="The name under which it was saved.")],
        )

    @classmethod
    def execute(cls, linvideo: Artifact, filename: str, overwrite: bool) -> io.NodeOutput:
        """Write the file, then show it and where it went."""
        path = choose_path(filename, overwrite=overwrite)
        artifact.save(linvideo, path)
        name = shown_name(path)
        picture = show_summary(linvideo, note=f"saved as models/{FOLDER}/{name}")
        return io.NodeOutput(name, ui=ui.PreviewImage(picture, cls=cls))


class LinVideoLoad(io.ComfyNode):
    """A file of models/linvideo -> LINVIDEO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoLoad",
            display_name="LinVideo Load",
            description=f"Loads a LinVideo file from models/{FOLDER}, to be applied by LinVideo "
            "Linearize or shown by LinVideo Show File.",
            search_aliases=["load linvideo", "load file", "linear attention"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(),
                    tooltip=f"Which LinVideo file to load. Put your own into models/{FOLDER}.",
                ),
            ],
            outputs=[LinVideo.Output("LINVIDEO", tooltip="The file, for LinVideo's nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Run again when the file was replaced by another of the same name."""
        return fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the file and check everything in it."""
        return io.NodeOutput(artifact.load(find_file(file)))


class LinVideoShowFile(io.ComfyNode):
    """LINVIDEO -> a picture of it, and the same in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoShowFile",
            display_name="LinVideo Show File",
            description="Draws what a LinVideo file holds: which layers are linear, how large its "
            "parts are, how it was trained, which steps it is sampled with and where it is from.",
            search_aliases=["show linvideo", "inspect", "file info", "metadata", "layers"],
            is_output_node=True,
            inputs=[LinVideo.Input("linvideo", tooltip="What to show: LINVIDEO of another node.")],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The picture."),
                io.String.Output("text", tooltip="The same in words, a line each."),
            ],
        )

    @classmethod
    def execute(cls, linvideo: Artifact) -> io.NodeOutput:
        """Draw the file and say the same in words."""
        picture = show_summary(linvideo)
        text = "\n".join(f"{name}: {fact}" for name, fact in describe(linvideo).items())
        return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture, cls=cls))
