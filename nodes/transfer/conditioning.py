"""What a graph's inputs say to a model, in the form in which the core trains with it."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...linvideo_core.demo.prompts import all_prompts, encode_prompts
from ...linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts, split_prompts
from ..patching.families import PROMPT, Video

_EVERY_PROMPT = 5
"""Of LinVideo's 300 prompts a node learns with each fifth: more than it makes videos, as a rule."""

# Each holds for a part of the picture or of the sampling, or is a model of its own.
_PARTIAL = ("area", "mask", "start_percent", "end_percent", "control", "gligen", "hooks")
_CONCAT = "c_concat"
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
    "minimax_payload": "first frame, last frame or references",
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
        values = (self.prompt_embeds, self.negative_embeds, self.concat, self.inputs)
        return digest_of(values)


def find_conditions(
    model: Any,
    inputs: dict[str, Any],
    video: Video,
    *,
    is_demo: bool,
    width: int | None,
    refines_prompts: bool,
) -> Conditions:
    """Return the conditions of a transfer of a ModelPatcher: what is connected, listed, or usual.

    inputs: by name, see `read_transfer_inputs`. width: T, None where any will do.
    refines_prompts: by the model's own weights, which are loaded for it.

    Raises ValueError for what is missing, what is there twice, and what cannot be learned from.
    """
    branches = {name: inputs.get(name) for name in ("positive", "negative")}
    prompts, clip = split_prompts(inputs.get("prompts") or ""), inputs.get("clip")
    if prompts and branches["positive"] is not None:
        raise ValueError(
            "prompts are listed and positive is connected, but one of the two is needed: "
            "empty the list or disconnect positive"
        )
    if is_demo:
        texts = {"positive": prompts or all_prompts(), "negative": [""]}
        for name in [name for name, found in branches.items() if found is None]:
            branches[name] = [[encode_prompts(texts[name]), {}]]
    elif clip is not None:
        if branches["negative"] is None:
            branches["negative"] = _encode_list([NEGATIVE_PROMPT], clip, {})
        if branches["positive"] is None:
            others = dict(branches["negative"][0][1]) if branches["negative"] else {}
            texts = prompts or default_prompts()[::_EVERY_PROMPT]
            branches["positive"] = _encode_list(texts, clip, others)
    elif prompts:
        raise ValueError(
            "prompts are listed but clip is not connected: connect the CLIP of the model's text "
            "encoder"
        )
    for name, entries in branches.items():
        if entries is None:
            raise ValueError(
                f"{name} is not connected: connect a text encoder's CONDITIONING; several "
                "positive prompts are combined, or listed in prompts; with clip alone, those "
                "that come with LinVideo are learned with"
            )
        if other := [rows.shape[-1] for rows, _ in entries if width not in (None, rows.shape[-1])]:
            raise ValueError(
                f"{name} is {other[0]} numbers wide, but this model takes {width}: connect the "
                "text encoder that belongs to it"
            )
    if refines_prompts:
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([model])
    device = model.load_device if refines_prompts else "cpu"
    return read_conditions(model.model, *branches.values(), video, device)


def _encode_list(prompts: list[str], clip: Any, others: dict[str, Any]) -> list[Any]:
    """Encode prompts with a graph's CLIP, one entry each; others: further options of each."""
    # As nodes run: the encoder's weights may belong to ComfyUI's inference mode.
    with torch.inference_mode():
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts]
    return [[embeds, {**others, **options}] for entries in encoded for embeds, options in entries]


def read_conditions(
    base_model: Any,
    positive: list[Any],
    negative: list[Any],
    video: Video,
    device: torch.device | str = "cpu",
) -> Conditions:
    """Encode conditioning as ComfyUI does before it samples.

    base_model: ComfyUI's model around the diffusion model.
    positive: each entry, and each row of an entry, is one prompt.
    device: where it is encoded; the model's, where its own weights encode.

    Raises ValueError for what a transfer cannot learn from.
    """
    encoded = []
    for name, entries in (("positive", positive), ("negative", negative)):
        _check(name, entries)
        encoded.append(_encode(base_model, name, _part(entries), video, device))
    if len(encoded[1]) != 1:
        raise ValueError(
            f"the negative conditioning holds {len(encoded[1])} prompts, but one is needed: "
            "connect a single prompt"
        )
    first, *others = [entry for branch in encoded for entry in branch]
    prompts = video.join_prompts([entry.pop(PROMPT) for entry in (first, *others)])
    for other in others:
        _check_alike(first, other)
    return Conditions(prompts[:-1], prompts[-1], first.pop(_CONCAT, None), first)


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


def _part(entries: list[Any]) -> list[Any]:
    """Return an entry for each row: some models encode no more than one prompt at once."""
    return [[row.unsqueeze(0), options] for rows, options in entries for row in rows]


def _encode(
    base_model: Any, name: str, entries: list[Any], video: Video, device: torch.device | str
) -> list[dict[str, Any]]:
    """Return the inputs of a model call for each entry, ordinary tensors, by name."""
    latents = torch.zeros(1, *video.latent_shape, device=device)
    # As ComfyUI itself encodes: weights that take part may belong to its inference mode.
    with torch.inference_mode():
        conds = comfy.samplers.encode_model_conds(
            base_model.extra_conds,
            comfy.sampler_helpers.convert_cond(entries),
            latents,
            latents.device,
            name,
            latent_image=latents,
            **video.encoding,
        )
        encoded = [{key: x.cond for key, x in cond["model_conds"].items()} for cond in conds]
        encoded = [video.read_inputs(inputs) for inputs in encoded]
    _refuse_references(encoded)
    # What is made in inference mode cannot take part in training; a clone outside of it can.
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), encoded)


def _refuse_references(encoded: list[dict[str, Any]]) -> None:
    for name, value in (item for inputs in encoded for item in inputs.items()):
        if isinstance(value, list) and any(map(torch.is_tensor, value)):
            raise ValueError(
                f"the conditioning has a list of references ({name}), which a transfer cannot "
                "learn from: connect conditioning without it"
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
    if isinstance(left, dict) and isinstance(right, dict):
        return all(_is_alike(left.get(name), right.get(name)) for name in left.keys() | right)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_alike, left, right))
    return not torch.is_tensor(left) and not torch.is_tensor(right) and left == right


def digest_of(values: Iterable[Any]) -> str:
    """Return 16 hex digits of tensors, numbers, text, adapters, and lists and dicts of them."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if torch.is_tensor(value):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        if not value.is_meta:
            digest.update(_plain(value).cpu().contiguous().numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            _add(digest, part)
    elif isinstance(value, dict):
        for name in sorted(value):
            _add(digest, name)
            _add(digest, value[name])
    elif hasattr(value, "weights"):
        _add(digest, value.weights)
    elif value is None or isinstance(value, str | int | float):
        digest.update(repr(value).encode())


def _plain(tensor: Tensor) -> Tensor:
    """Return what a tensor holds as numbers that numpy knows: quantised ones are made wide."""
    tensor = tensor.detach()
    if hasattr(tensor, "_layout_cls"):
        tensor = tensor.dequantize()
    tensor = tensor.as_subclass(Tensor)
    return tensor.float() if tensor.is_floating_point() else tensor
