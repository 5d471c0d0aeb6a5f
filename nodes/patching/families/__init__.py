"""What ComfyUI's code of each model family needs, a file each: its attention, its videos.

The core knows latents [B, C, F, H, W] and a call for a whole batch. A family whose model takes
anything else has a kind of `Video` of its own.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....linvideo_core.artifact import ArtifactError
from ....linvideo_core.demo.codec import LATENT_SHAPE
from ....linvideo_core.kernels.tiles import TokenGrid
from ...demo import DemoLatents

PROMPT = "c_crossattn"
"""The prompt's name among the inputs of a model call."""

USUAL_SIZE = {"width": 832, "height": 480, "frames": 81}
"""Of the videos to learn from, where nothing says otherwise."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video as most models take it: latents [B, C, F, H, W] of a whole batch in one call.

    latent_shape: (C, F, H, W) in which the core keeps one; patch_size: latents of a token.
    """

    latent_shape: tuple[int, ...]
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def find(cls, model: Any, inputs: dict[str, Any]) -> "Video":
        """Return the video that a ModelPatcher is to learn with, from a transfer's inputs.

        Raises ValueError for a connected latent that the model does not take.
        """
        patch_size = getattr(model.model.diffusion_model, "patch_size", (1, 2, 2))
        return cls(_find_shape(model.model.latent_format, inputs), tuple(patch_size))

    @staticmethod
    def measure(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Return frames, height and width in pixels of a video's latents (C, F, H, W).

        None where they follow from the latent format's ratios.
        """
        return None

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of the latents that become the picture."""
        return self.latent_shape

    @property
    def size(self) -> tuple[int, int, int] | None:
        """Frames, height and width in pixels, see `measure`."""
        return self.measure(self.picture_shape)

    def count_tokens(self, num_prompt_tokens: int) -> int:
        """Return L, the tokens of a sequence in which self-attention is."""
        sizes = zip(self.latent_shape[1:], self.patch_size, strict=True)
        return math.prod(-(-size // side) for size, side in sizes)

    @property
    def encoding(self) -> dict[str, Any]:
        """Further arguments with which ComfyUI encodes conditioning for such latents."""
        return {}

    def read_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a model call by name, as training is given them.

        inputs: as ComfyUI encodes a single prompt's, itself [1, S, T] under `PROMPT`.
        """
        return inputs

    def join_prompts(self, prompts: list[Tensor]) -> Tensor:
        """Return prompts [1, S, T] as one tensor [P, S, T]; they must be equally long."""
        lengths = sorted({prompt.shape[1] for prompt in prompts})
        if len(lengths) > 1:
            raise ValueError(
                f"the prompts are {' and '.join(map(str, lengths))} tokens long, but one length is "
                "needed: shorten the longest"
            )
        return torch.cat(prompts)

    def call(
        self,
        diffusion_model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        options: dict[str, Any],
        inputs: dict[str, Any],
    ) -> Tensor:
        """Return the velocity of latents [B, C, F, H, W] in the same shape.

        timesteps: [B], the model's own; prompt_embeds: [B, S, T].
        options: the `transformer_options`; inputs: the others of a model call, by name.
        """
        return diffusion_model(
            latents, timesteps, context=prompt_embeds, transformer_options=options, **inputs
        )

    def show(self, latents: Tensor) -> Tensor:
        """Return the picture's part of latents [B, C, F, H, W], in such a shape."""
        return latents


def _nothing(*_: Any, **__: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class HostFamily:
    """A model family as ComfyUI computes it.

    attention_module, attention_class: the class whose forward makes the one attention call. A
        subclass may never call forward, or keep a cache that linear attention has not: only the
        class itself will do.
    find_joining_inputs: (diffusion_model, names of the inputs of a model call) -> those whose
        tokens join the video's in self-attention, which files are not made with.
    find_grid: (diffusion_model, (F, H, W) of a call's latents, its inputs) -> where the video's
        tokens lie in its sequence; diffusion_model is of one of the classes `of_known_grid`.
    run_fused: (attention, attend, its forward's arguments) -> what its class's own forward gives,
        computed with fewer passes; None where only that forward will do. in_training: also where a
        gradient is wanted.
    video: how the model is called for the videos that a transfer learns with.
    refines_prompts: whether ComfyUI sends prompts through weights of the model before it samples.
    find_sinks: (a call's `transformer_options`, its number of tokens) -> `sink_blocks` and `sink_q`
        of sparse attention by name: what a video shares a sequence with stays exact.
    prepare_for_training: changes a copy of the model so that a gradient passes through its blocks.
    """

    name: str
    attention_module: str
    attention_class: str
    find_joining_inputs: Callable[[nn.Module, Collection[str]], list[str]]
    find_grid: Callable[[nn.Module, tuple[int, ...], Mapping[str, Any]], TokenGrid]
    of_known_grid: Collection[str]
    run_fused: Callable[..., Tensor | None] = _nothing
    video: type[Video] = Video
    refines_prompts: bool = False
    find_sinks: Callable[[Mapping[str, Any], int], dict[str, tuple[int, int]]] = lambda *_: {}
    prepare_for_training: Callable[[nn.Module], None] = _nothing

    def check(self, attention: nn.Module) -> None:
        """Raise ArtifactError when a layer is not of the class that is known."""
        expected = getattr(importlib.import_module(self.attention_module), self.attention_class)
        if type(attention) is not expected:
            raise ArtifactError(
                f"this kind of {self.name} model keeps its attention in "
                f"{type(attention).__name__}, which LinVideo cannot make linear; use a model whose "
                f"layers are {self.attention_class}"
            )

    def knows_grid(self, diffusion_model: nn.Module) -> bool:
        """Say whether it is known how a model lays its tokens out."""
        return type(diffusion_model).__name__ in self.of_known_grid

    def check_grid(self, diffusion_model: nn.Module) -> None:
        """Raise ArtifactError where it is not known how a model lays its tokens out."""
        if not self.knows_grid(diffusion_model):
            name = type(diffusion_model).__name__
            raise ArtifactError(
                "hybrid layers work within tiles of the video, and LinVideo does not know where "
                f"{name} has the video's tokens: use a file of linear layers with this model"
            )


def host_family(name: str) -> HostFamily:
    """Return ComfyUI's side of a family of `linvideo_core.models.families`, from its file here."""
    return importlib.import_module(f".{name}", __name__).FAMILY


def refuse_mask(latent: dict[str, Any]) -> None:
    """Raise ValueError for a LATENT with a mask."""
    if "noise_mask" in latent:
        raise ValueError(
            "the latent has a mask, which a transfer cannot learn from: connect an empty latent "
            "without one"
        )


def given_size(inputs: dict[str, Any], usual: dict[str, int]) -> dict[str, int]:
    """Return width, height and frames: an expert's settings where they are not 0, else usual."""
    settings = inputs["settings"] or {}
    return {name: settings.get(name) or value for name, value in usual.items()}


def check_sides(size: dict[str, int], multiple: int) -> None:
    """Raise ValueError for a width or a height that is not of whole tokens."""
    for name in ("width", "height"):
        if size[name] % multiple:
            raise ValueError(
                f"{name} {size[name]} given; a multiple of {multiple} is needed for this model"
            )


def pixels_of(latent_format: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return frames, height and width in pixels of latents (F, H, W), by the format's ratios."""
    time_ratio, space_ratio = _ratios(latent_format)
    F, H, W = shape
    is_demo = isinstance(latent_format, DemoLatents)
    num_frames = time_ratio * F if is_demo else time_ratio * (F - 1) + 1
    return num_frames, space_ratio * H, space_ratio * W


def _ratios(latent_format: Any) -> tuple[int, int]:
    time_ratio = getattr(latent_format, "temporal_downscale_ratio", 4)
    return time_ratio, getattr(latent_format, "spacial_downscale_ratio", 8)


def _find_shape(latent_format: Any, inputs: dict[str, Any]) -> tuple[int, ...]:
    num_channels = latent_format.latent_channels
    is_demo = isinstance(latent_format, DemoLatents)
    if is_demo:
        _refuse_size(inputs)
    if (latent := inputs.get("latent")) is not None:
        samples = latent["samples"]
        shape = list(getattr(samples, "shape", ()))
        if not torch.is_tensor(samples) or len(shape) != 5 or shape[1] != num_channels:
            raise ValueError(
                f"latents of shape {shape} given, but this model takes [videos, "
                f"{num_channels}, frames, height, width]: connect an empty latent made for it"
            )
        refuse_mask(latent)
        return tuple(shape[1:])
    if is_demo:
        return LATENT_SHAPE
    time_ratio, space_ratio = _ratios(latent_format)
    size = given_size(inputs, USUAL_SIZE)
    check_sides(size, 2 * space_ratio)
    if (size["frames"] - 1) % time_ratio:
        raise ValueError(
            f"frames {size['frames']} given; {time_ratio} n + 1 is needed for this model, such as "
            f"{USUAL_SIZE['frames']}"
        )
    num_frames = (size["frames"] - 1) // time_ratio + 1
    return (num_channels, num_frames, size["height"] // space_ratio, size["width"] // space_ratio)


def _refuse_size(inputs: dict[str, Any]) -> None:
    """Raise ValueError for an expert's size of LinVideo Demo's videos, which have their own."""
    given = given_size(inputs, dict.fromkeys(USUAL_SIZE, 0))
    shown = " ".join(f"{name} {value}" for name, value in given.items() if value)
    if shown:
        raise ValueError(
            f"{shown} is for a model of your own, and this is LinVideo Demo's, whose videos have a "
            "size of their own: set it to 0"
        )
