"""LinVideo Export Prompts: from a graph's CLIP to embeddings that the headless commands take.

For an image-to-video model the images go into the same file, as that model is given them.
"""

import hashlib
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..linvideo_core.models.image_condition import ImageCondition
from ..linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts, split_prompts
from ..linvideo_core.prompts.embeddings import encode_once, find_identity, identity_of
from ..linvideo_core.run.callbacks import Callbacks
from .model_folder import FOLDER, choose_prompts_path
from .patching.families import Video
from .schema import make_schema


class LinVideoExportPrompts(io.ComfyNode):
    """CLIP and prompts, with images where the model wants them -> a file in the output folder."""

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
                io.Conditioning.Input(
                    "images",
                    optional=True,
                    tooltip="For image-to-video: the positive of WanImageToVideo, of the size and "
                    "length to learn at. One image for all prompts; or one for each, in their "
                    "order, joined by Conditioning (Combine).",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The image-to-video model, to which the images are given its way.",
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
        cls,
        clip: Any,
        prompts: str,
        negative: str,
        filename: str,
        overwrite: bool,
        images: list[Any] | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        """Encode what the file does not hold yet, then say where it is."""
        path = choose_prompts_path(filename)
        texts = split_prompts(prompts) or default_prompts()
        condition = read_images(model, images, len(texts)) if images is not None else None
        # The negative prompt is the first to be encoded, and what it becomes tells this CLIP, with
        # all that was applied to it, from any other.
        first = encode_as_host(clip, negative)
        encoder = _digest(first) + (condition.digest() if condition else "")
        identity = identity_of(texts, negative, encoder)
        if path.exists() and not overwrite and find_identity(path) != identity:
            raise ValueError(
                f"{path} exists and holds other prompts, another encoder's or other images: "
                "choose another filename, or switch overwrite on"
            )
        bar = comfy.utils.ProgressBar(len(texts) + 1)

        class Bar(Callbacks):
            def on_step_end(self, done: int, **metrics: float) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(done, len(texts) + 1)

        def encode(text: str) -> Tensor:
            return first if text == negative else encode_as_host(clip, text)

        settings = {"identity": identity, "condition": condition, "callbacks": Bar()}
        is_new = encode_once(path, texts, [negative], encode, **settings)
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


def read_images(model: Any, images: list[Any], num_prompts: int) -> ImageCondition:
    """Return what an image-to-video model is given of conditioning, an entry an image.

    Raises ValueError for conditioning without images, too many of them, or more than images.
    """
    from .transfer.conditioning import read_conditions

    if model is None:
        raise ValueError("images is connected without model: connect the image-to-video model")
    if len(images) not in (1, num_prompts):
        raise ValueError(
            f"images holds {len(images)} images for {num_prompts} prompts: connect one for all, "
            "or as many as prompts"
        )
    found = []
    for entry in images:
        latents = entry[1].get("concat_latent_image")
        if latents is None:
            raise ValueError(
                "images holds no start image: connect the positive of WanImageToVideo, with its "
                "start_image connected"
            )
        given = read_conditions(model.model, [entry], [entry], Video(tuple(latents.shape[1:])))
        others = given.inputs.keys() - {"clip_fea"}
        if given.concat is None or others:
            reason = f"gives it {sorted(others)[0]!r}, too" if others else "has no effect on it"
            raise ValueError(
                f"images {reason}, which a file cannot hold for this model: connect an "
                "image-to-video model, and its WanImageToVideo"
            )
        found.append((given.concat, given.inputs.get("clip_fea")))
    latents, clip_embeds = zip(*found, strict=True)
    has_clip = clip_embeds[0] is not None
    return ImageCondition(torch.cat(latents), torch.cat(clip_embeds) if has_clip else None)


def _digest(embeds: Tensor) -> str:
    data = embeds.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
