"""What a graph's CONDITIONING says to a model, in the form in which the core trains with it."""

import dataclasses
import hashlib
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from . import digests

# Each holds for a part of the picture or of the sampling, or is a model of its own.
_PARTIAL = ("area", "mask", "start_percent", "end_percent", "control", "gligen", "hooks")
_PROMPT, _CONCAT = "c_crossattn", "c_concat"
# What an artist connects, by the name under which ComfyUI gives it to a model.
_WORDS = {
    _CONCAT: "start image or control video",
    "clip_fea": "CLIP Vision image",
    "clip_fea_ref": "CLIP Vision image",
    "clip_fea_pose": "CLIP Vision image of the pose",
    "context_pose": "prompt of the pose",
    "reference_latent": "reference image",
    "ref_mask_latents": "mask of the reference",
    "time_dim_concat": "reference images",
    "reference_motion": "reference motion",
    "control_video": "control video",
    "vace_context": "control video, mask or reference image",
    "vace_strength": "strength of VACE",
    "camera_conditions": "camera motion",
    "pose_latents": "pose video",
    "face_pixel_values": "face video",
    "sam_latents": "mask video",
    "audio_embed": "audio",
    "audio_inject_scale": "strength of the audio",
    "fps": "frame rate",
}


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The prompts of both guidance branches, and what else the model is called with.

    prompt_embeds: [P, S, T]; negative_embeds: [S, T].
    concat: [1, K, F, H, W], channels that are joined to the latents, such as a start image's.
    inputs: further inputs of a model call by name; tensors are [1, ...].
    """

    prompt_embeds: Tensor
    negative_embeds: Tensor
    concat: Tensor | None = None
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """Return 16 hex digits that tell these conditions from others."""
        found = hashlib.blake2b(digest_size=8)
        for value in (self.prompt_embeds, self.negative_embeds, self.concat):
            digests.add(found, value)
        for name in sorted(self.inputs):
            digests.add(found, name)
            digests.add(found, self.inputs[name])
        return found.hexdigest()


def read_conditions(
    base_model: Any, positive: list[Any], negative: list[Any], latent_shape: tuple[int, ...]
) -> Conditions:
    """Encode conditioning as ComfyUI does before it samples.

    base_model: ComfyUI's model around the diffusion model.
    positive: each entry, and each row of an entry, is one prompt.
    latent_shape: (C, F, H, W).

    Raises ValueError, in one sentence, for what a transfer cannot learn from.
    """
    encoded = []
    for name, entries in (("positive", positive), ("negative", negative)):
        _check(name, entries)
        encoded.append(_encode(base_model, name, entries, latent_shape))
    rows = [[entry.pop(_PROMPT) for entry in branch] for branch in encoded]
    _check_lengths([row for branch in rows for row in branch])
    if len(rows[1]) != 1 or len(rows[1][0]) != 1:
        raise ValueError(
            f"the negative conditioning holds {sum(map(len, rows[1]))} prompts, but one is needed: "
            "connect a single prompt"
        )
    first, *others = [entry for branch in encoded for entry in branch]
    for other in others:
        _check_alike(first, other)
    return Conditions(torch.cat(rows[0]), rows[1][0][0], first.pop(_CONCAT, None), first)


def _check(name: str, entries: list[Any]) -> None:
    if not entries or any(entry[0] is None or not len(entry[0]) for entry in entries):
        raise ValueError(
            f"the {name} conditioning holds no prompt: connect a text encoder's CONDITIONING"
        )
    for _, options in entries:
        if found := [key for key in _PARTIAL if options.get(key) is not None]:
            raise ValueError(
                f"the {name} conditioning has {found[0]!r}, which a transfer cannot learn from: "
                "connect the prompt from before the node that adds it"
            )


def _encode(
    base_model: Any, name: str, entries: list[Any], latent_shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the inputs of a model call for each entry, ordinary tensors, by name."""
    latents = torch.zeros(1, *latent_shape)
    conds = comfy.samplers.encode_model_conds(
        base_model.extra_conds,
        comfy.sampler_helpers.convert_cond(entries),
        latents,
        latents.device,
        name,
        latent_image=latents,
    )
    return [
        {key: _ordinary(key, condition.cond) for key, condition in cond["model_conds"].items()}
        for cond in conds
    ]


def _ordinary(name: str, value: Any) -> Any:
    # What a node makes in inference mode cannot take part in training; a clone outside of it can.
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, list) and any(map(torch.is_tensor, value)):
        raise ValueError(
            f"the conditioning has a list of references ({name}), which a transfer cannot learn "
            "from: connect conditioning without it"
        )
    return value


def _check_lengths(prompts: list[Tensor]) -> None:
    lengths = sorted({prompt.shape[1] for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"the prompts are {' and '.join(map(str, lengths))} tokens long, but one length is "
            "needed: shorten the longest"
        )


def _check_alike(first: dict[str, Any], other: dict[str, Any]) -> None:
    for name in sorted(first.keys() | other.keys()):
        if not _is_alike(first.get(name), other.get(name)):
            words = _WORDS.get(name, f"values of {name!r}")
            raise ValueError(
                f"the prompts come with different {words}, but a transfer needs the same for all, "
                f"positive and negative: connect the same {words} to each, by positive outputs "
                "alone where a node leaves it out of its negative one"
            )


def _is_alike(left: Any, right: Any) -> bool:
    if torch.is_tensor(left) and torch.is_tensor(right):
        return torch.equal(left, right)
    return not torch.is_tensor(left) and not torch.is_tensor(right) and left == right
