"""LinVideo Export Prompts: from a graph's CLIP to embeddings that the headless commands take."""

import hashlib
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts, split_prompts
from ..linvideo_core.prompts.embeddings import encode_once, find_identity, identity_of
from ..linvideo_core.run.callbacks import Callbacks
from .model_folder import FOLDER, choose_prompts_path
from .schema import make_schema


class LinVideoExportPrompts(io.ComfyNode):
    """CLIP and prompts -> a file of embeddings in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoExportPrompts",
            display_name="LinVideo Export Prompts",
            description="Encodes a list of prompts once, as your Wan model receives them, and "
            f"saves them in output/{FOLDER}, for LinVideo's commands outside of ComfyUI: python -m "
            "linvideo_core.transfer --prompts FILE needs no text encoder then.",
            search_aliases=["export prompts", "prompt embeddings", "save conditioning", "umt5"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="Wan's text encoder: CLIP of Load CLIP, type wan."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="The prompts, one a line, the more different the better. Leave it "
                    f"empty for LinVideo's own: {len(default_prompts())} that are full of motion.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default=NEGATIVE_PROMPT,
                    tooltip="The negative prompt that you will sample with.",
                ),
                io.String.Input(
                    "filename",
                    default="prompts",
                    tooltip=f"The file's name; folders/in/between are made in output/{FOLDER}.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: a file of that name with other prompts is left alone, and the "
                    "node says so. On: it is replaced.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="Where the file is: what --prompts takes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, filename: str, **_: Any) -> str:
        """Run again when the file was moved away or replaced."""
        path = choose_prompts_path(filename)
        return str(path.stat().st_mtime_ns) if path.exists() else ""

    @classmethod
    def execute(
        cls, clip: Any, prompts: str, negative: str, filename: str, overwrite: bool
    ) -> io.NodeOutput:
        """Encode what the file does not hold yet, then say where it is."""
        path = choose_prompts_path(filename)
        texts = split_prompts(prompts) or default_prompts()
        # The negative prompt is the first to be encoded, and what it becomes tells this CLIP, with
        # all that was applied to it, from any other.
        first = encode_as_host(clip, negative)
        identity = identity_of(texts, negative, _digest(first))
        if path.exists() and not overwrite and find_identity(path) != identity:
            raise ValueError(
                f"{path} exists and holds other prompts or another encoder's: "
                "choose another filename, or switch overwrite on"
            )
        bar = comfy.utils.ProgressBar(len(texts) + 1)

        class Bar(Callbacks):
            def on_step_end(self, done: int, **metrics: float) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(done, len(texts) + 1)

        def encode(text: str) -> Tensor:
            return first if text == negative else encode_as_host(clip, text)

        is_new = encode_once(path, texts, negative, encode, identity=identity, callbacks=Bar())
        done = "encoded into" if is_new else "were there already, in"
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"{len(texts)} prompts {done} {path}"))


def encode_as_host(clip: Any, text: str) -> Tensor:
    """Return what the host's Wan receives for a prompt, [512, T] with zeros after its tokens.

    Raises ValueError for a text encoder that is not Wan's.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(conditioning) != 1:
        raise ValueError(
            "this CLIP changes the prompt while sampling, which a file of embeddings cannot hold: "
            "connect it from before the node that schedules it"
        )
    embeds, options = conditioning[0]
    if embeds.ndim != 3 or len(embeds) != 1 or options.get("pooled_output") is not None:
        raise ValueError(
            f"this CLIP gives embeddings of shape {list(embeds.shape)} or a pooled output, unlike "
            "Wan's: connect Load CLIP with umt5_xxl and type wan"
        )
    return embeds[0]


def _digest(embeds: Tensor) -> str:
    data = embeds.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
