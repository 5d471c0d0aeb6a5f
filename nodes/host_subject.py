"""A graph's MODEL as the subject of a transfer: what it is, and a twin that can be trained.

The MODEL itself is only looked at, and lends the twin its weights: see `frozen_weights`.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch

from ..linvideo_core import adapters
from ..linvideo_core.demo.codec import LATENT_SHAPE, decode_latents
from ..linvideo_core.demo.prompts import all_prompts, encode_prompts
from ..linvideo_core.models.denoiser import TIMESTEP_SCALE
from ..linvideo_core.subject import Subject
from .conditions import Conditions, read_conditions
from .demo import DemoLatents
from .families import host_family
from .frozen_weights import freeze
from .host_model import HostModel
from .patching import untouched
from .prompt_list import encode_for_demo, encode_prompt_list, read_prompt_list

TRAINABLE_SINCE = "0.25"
"""The first ComfyUI that was tried; `in_training` makes its operations have a backward pass."""


class HostSubject:
    """Everything a transfer needs to know of a MODEL and of what is connected beside it.

    sites: its self-attention layers; latent_shape: (C, F, H, W); shift: of its noise levels.

    Raises ValueError, in one sentence, for what cannot be trained.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        """inputs: by name, see `transfer_inputs`: prompts and size are read here."""
        diffusion_model = untouched(model)
        if not hasattr(comfy.model_management, "in_training"):
            raise ValueError(
                f"running the transfer needs ComfyUI {TRAINABLE_SINCE} or newer: update ComfyUI, "
                "or apply a saved file"
            )
        family, self.sites = adapters.identify(adapters.shapes_of(diffusion_model))
        self.family = known = host_family(family.name)
        if not known.is_trainable:
            raise ValueError(
                f"a {family.name} model cannot run the transfer inside ComfyUI yet: apply a saved "
                "file"
            )
        for site in self.sites:
            known.check(diffusion_model.get_submodule(site.name))
        self.model = model
        self.device: torch.device = model.load_device
        self.latent_format = model.model.latent_format
        self.is_demo = isinstance(self.latent_format, DemoLatents)
        self.shift = _find_shift(model.get_model_object("model_sampling"))
        self.latent_shape = self._find_latent_shape(inputs)
        self.conditions = self._find_conditions(inputs)

    def weights_digest(self) -> str:
        """Return 16 hex digits that tell these weights, and patches on them, from others."""
        digest = hashlib.blake2b(digest_size=8)
        for site in (self.sites[0], self.sites[-1]):
            layer = self.model.model.diffusion_model.get_submodule(site.name)
            for name, parameter in layer.named_parameters():
                # Where patches are merged in, the weight itself waits in the backup.
                backup = self.model.backup.get(f"diffusion_model.{site.name}.{name}")
                _add(digest, parameter if backup is None else backup.weight)
        for key in sorted(self.model.patches, key=str):
            _add(digest, key)
            _add(digest, self.model.patches[key])
        return digest.hexdigest()

    @contextlib.contextmanager
    def subject(self, *, is_copied: bool, needed_bytes: int) -> Iterator[Subject]:
        """Load the model, and lend a twin of it that can be trained, for a while.

        is_copied: the twin's linear layers are copies, see `freeze`; needed_bytes: of the device's
        memory that the training takes beside the weights.
        """
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.model], memory_required=needed_bytes)
        was_in_training = comfy.model_management.in_training
        # ComfyUI's own way to say: operations that have a backward pass, please.
        comfy.model_management.in_training = True
        try:
            yield self._make_subject(is_copied)
        finally:
            comfy.model_management.in_training = was_in_training

    def _make_subject(self, is_copied: bool) -> Subject:
        base_model = self.model.model
        twin = freeze(base_model.diffusion_model, self.device, is_copied=is_copied)
        model = HostModel(
            twin,
            self.sites,
            self.conditions,
            dtype=torch.float32 if is_copied else self.training_dtype,
            family=self.family,
            timestep_scale=base_model.model_sampling.multiplier / TIMESTEP_SCALE,
        )
        adapters.keep_digest(model, self.weights_digest())
        return Subject(
            name=_name(self.model, self.is_demo),
            model=model,
            prompts=[f"prompt {i}" for i in range(len(self.conditions.prompt_embeds))],
            prompt_embeds=self.conditions.prompt_embeds.float().to(self.device),
            negative_embeds=self.conditions.negative_embeds.float().to(self.device),
            latent_shape=self.latent_shape,
            decode=decode_latents,
            is_demo=self.is_demo,
        )

    @property
    def training_dtype(self) -> torch.dtype:
        """In which a twin computes whose weights stay the host's; gradients overflow in fp16."""
        has_bf16 = comfy.model_management.should_use_bf16(self.device)
        return torch.bfloat16 if has_bf16 and self.device.type != "cpu" else torch.float32

    def _find_latent_shape(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        num_channels = self.latent_format.latent_channels
        if (latent := inputs.get("latent")) is not None:
            samples = latent["samples"]
            shape = list(getattr(samples, "shape", ()))
            if not torch.is_tensor(samples) or len(shape) != 5 or shape[1] != num_channels:
                raise ValueError(
                    f"latents of shape {shape} given, but this model takes [videos, "
                    f"{num_channels}, frames, height, width]: connect an empty latent made for it"
                )
            if "noise_mask" in latent:
                raise ValueError(
                    "the latent has a mask, which a transfer cannot learn from: connect an empty "
                    "latent without one"
                )
            return tuple(shape[1:])
        if self.is_demo:
            return LATENT_SHAPE
        time_ratio = getattr(self.latent_format, "temporal_downscale_ratio", 4)
        space_ratio = getattr(self.latent_format, "spacial_downscale_ratio", 8)
        num_frames = (inputs["frames"] - 1) // time_ratio + 1
        size = (inputs[side] // space_ratio for side in ("height", "width"))
        return (num_channels, num_frames, *size)

    def _find_conditions(self, inputs: dict[str, Any]) -> Conditions:
        branches = {name: inputs.get(name) for name in ("positive", "negative")}
        if prompts := read_prompt_list(inputs.get("prompts") or ""):
            if branches["positive"] is not None:
                raise ValueError(
                    "prompts are listed and positive is connected, but one of the two is needed: "
                    "empty the list or disconnect positive"
                )
            branches["positive"] = self._encode(prompts, inputs.get("clip"), branches["negative"])
        if self.is_demo:
            texts = {"positive": all_prompts(), "negative": [""]}
            for name, found in branches.items():
                if found is None:
                    branches[name] = [[encode_prompts(texts[name]), {}]]
        for name, found in branches.items():
            if found is None:
                raise ValueError(
                    f"{name} is not connected: connect a text encoder's CONDITIONING; several "
                    "positive prompts are combined, or listed in prompts"
                )
        return read_conditions(self.model.model, *branches.values(), self.latent_shape)

    def _encode(self, prompts: list[str], clip: Any, negative: list[Any] | None) -> list[Any]:
        if self.is_demo:
            return encode_for_demo(prompts)
        others = dict(negative[0][1]) if negative else {}
        encoded = encode_prompt_list(prompts, clip)
        return [[embeds, {**others, **options}] for embeds, options in encoded]


def _find_shift(model_sampling: Any) -> float:
    is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if not is_flow or not isinstance(
        model_sampling, comfy.model_sampling.ModelSamplingDiscreteFlow
    ):
        raise ValueError(
            "this model's sampling is no shifted flow, which a transfer needs: connect a Wan model "
            "without a node that changes its sampling to another kind"
        )
    return float(model_sampling.shift)


def _name(model: Any, is_demo: bool) -> str:
    """Return what the file says that it was made from: the model file's name where it is known."""
    if is_demo:
        return "demo"
    _, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    paths = [Path(argument).stem for argument in arguments if isinstance(argument, str)]
    name = paths[0] if paths else type(model.model).__name__
    return name[:100] if name.isprintable() else type(model.model).__name__


def _add(digest: Any, value: Any) -> None:
    """Take in what a patch is made of: tensors, numbers, adapters and tuples of these."""
    if torch.is_tensor(value):
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            _add(digest, part)
    elif hasattr(value, "weights"):
        _add(digest, value.weights)
    elif value is None or isinstance(value, str | int | float):
        digest.update(repr(value).encode())
