"""MiniMax-H3's video and its sound: one packed vector for the core, two streams for the model.

As ComfyUI's samplers do, the sound is carried on the video's schedule: at the video's noise level
t the vector holds `t / t_a` times the sound's own state at its level t_a. Then one noise level
holds for the whole vector, and its velocity is what the model returns for the carried streams.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .video import PROMPT, Video, given_size, refuse_mask

USUAL_SIZE = {"width": 1344, "height": 768, "frames": 124}
"""Of ComfyUI's own empty latent for this model."""

_PAYLOAD, _TAGS = "minimax_payload", "text_token_tags"
_TEXT_TAG = 1
_FRAMES_A_SECOND, _SOUND_A_SECOND = 24, 40
_SPACE_RATIO = 16
# Five latents hold 17 frames; two more, the first ones, hold 5.
_GROUP, _FRAMES_OF_GROUP, _HEAD, _FRAMES_OF_HEAD = 5, 17, 2, 5
_SHIFT_OPTIONS = "minimax_h3_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundVideo(Video):
    """A video [B, C, F, H, W] with its sound [B, C, 2, T], joined to latents [B, 1, 1, 1, n].

    shapes: of one video and one sound, without B.
    sound_scale: how much larger the sound is carried at noise level 0.
    options: of the model's `transformer_options`, those that tell its noise schedules.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    sound_scale: float
    options: dict[str, Any]

    @classmethod
    def find(cls, model: Any, inputs: dict[str, Any]) -> "SoundVideo":
        """Return the video that a ModelPatcher is to learn with; see `Video.find`."""
        diffusion_model = model.model.diffusion_model
        channels = (diffusion_model.latents_dim, diffusion_model.audio_latents_dim)
        shapes = _find_shapes(channels, inputs)
        options = model.model_options.get("transformer_options", {})
        return cls(
            latent_shape=(1, 1, 1, sum(map(math.prod, shapes))),
            patch_size=tuple(diffusion_model.patch_size),
            shapes=shapes,
            sound_scale=getattr(model.get_model_object("model_sampling"), "audio_scale", 1.0),
            options={name: x for name, x in options.items() if name.startswith(_SHIFT_OPTIONS)},
        )

    @staticmethod
    def measure(shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return frames, height and width in pixels of a video's latents (C, F, H, W)."""
        _, F, H, W = shape
        num_frames = (F - _HEAD) // _GROUP * _FRAMES_OF_GROUP + _FRAMES_OF_HEAD
        return num_frames, _SPACE_RATIO * H, _SPACE_RATIO * W

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        return self.measure(self.shapes[0])

    def count_tokens(self, num_prompt_tokens: int) -> int:
        """Return L: prompt, sound and video are one sequence."""
        sizes = zip(self.shapes[0][1:], self.patch_size, strict=True)
        num_of_video = math.prod(-(-size // side) for size, side in sizes)
        return num_prompt_tokens + math.prod(self.shapes[1][1:]) + num_of_video

    @property
    def encoding(self) -> dict[str, Any]:
        """Further arguments with which ComfyUI encodes conditioning for such latents."""
        return {"latent_shapes": [(1, *shape) for shape in self.shapes]}

    def read_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call; a prompt's tokens get a last number, their tag plus one.

        What else differs with the prompt, the layout of the sequence, the model makes by itself.
        """
        payload = {name: x for name, x in inputs[_PAYLOAD].items() if name not in ("layout", _TAGS)}
        if "audio_scale" in payload:
            payload["audio_scale"] = self.sound_scale
        prompt, tags = inputs[PROMPT], inputs[_PAYLOAD].get(_TAGS)
        marks = prompt.new_full((1, prompt.shape[1], 1), 1 + _TEXT_TAG)
        if tags is not None:
            marks = (1 + tags).to(prompt).reshape(marks.shape)
        return {**inputs, PROMPT: torch.cat([prompt, marks], dim=-1), _PAYLOAD: payload}

    def join_prompts(self, prompts: list[Tensor]) -> Tensor:
        """Return prompts [1, S, T] as one tensor [P, longest S, T]; added tokens are all 0."""
        longest = max(prompt.shape[1] for prompt in prompts)
        pad = nn.functional.pad
        return torch.cat([pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])

    def call(
        self,
        diffusion_model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        options: dict[str, Any],
        inputs: dict[str, Any],
    ) -> Tensor:
        """Return the velocity of latents [B, 1, 1, 1, n], one sample after the other.

        prompt_embeds: [B, S, T] with the marks of `read_inputs`; see `Video.call` for the others.
        """
        velocities = []
        for sample, timestep, tokens in zip(latents, timesteps, prompt_embeds, strict=True):
            tokens = tokens[tokens[:, -1] > 0]
            payload = {**inputs[_PAYLOAD], _TAGS: tokens[:, -1].long() - 1}
            streams = diffusion_model(
                self._part(sample.reshape(1, -1)),
                timestep.reshape(1),
                context=tokens[None, :, :-1],
                transformer_options={**options, **self.options},
                **{_PAYLOAD: payload},
            )
            velocities.append(torch.cat([stream.flatten() for stream in streams]))
        return torch.stack(velocities).view_as(latents)

    def show(self, latents: Tensor) -> Tensor:
        """Return the video alone, [B, C, F, H, W]."""
        return self._part(latents.flatten(1))[0]

    def _part(self, packed: Tensor) -> list[Tensor]:
        """Return video and sound of packed vectors [B, n]."""
        streams = packed.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [x.unflatten(1, shape) for x, shape in zip(streams, self.shapes, strict=True)]


def _find_shapes(channels: tuple[int, int], inputs: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    if (latent := inputs.get("latent")) is not None:
        shapes = _shapes_of(latent["samples"])
        if [shape[0] for shape in shapes] != [*channels] or [*map(len, shapes)] != [4, 3]:
            raise ValueError(
                f"latents of shapes {[list(shape) for shape in shapes]} given, but this model "
                f"takes a video [{channels[0]}, frames, height, width] with its sound "
                f"[{channels[1]}, 2, length]: connect Empty MiniMax H3 AV Latent"
            )
        refuse_mask(latent)
        return shapes
    size = given_size(inputs, USUAL_SIZE)
    num_groups = max(0, -(-(size["frames"] - _FRAMES_OF_HEAD) // _FRAMES_OF_GROUP))
    num_frames = num_groups * _FRAMES_OF_GROUP + _FRAMES_OF_HEAD
    height, width = (size[side] // _SPACE_RATIO for side in ("height", "width"))
    length = round(num_frames / _FRAMES_A_SECOND * _SOUND_A_SECOND)
    return (
        (channels[0], num_groups * _GROUP + _HEAD, height, width),
        (channels[1], 2, length),
    )


def _shapes_of(samples: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a LATENT's streams, without B."""
    is_nested = getattr(samples, "is_nested", False)
    streams: Sequence[Tensor] = samples.unbind() if is_nested else [samples]
    return tuple(tuple(stream.shape[1:]) for stream in streams)
