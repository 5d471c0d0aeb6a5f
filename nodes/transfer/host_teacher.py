"""A graph's MODEL as the teacher of a transfer: what it is, and a twin that can be trained.

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
from comfy.model_management import module_size
from torch import nn

from ...linvideo_core.demo.codec import decode_latents
from ...linvideo_core.demo.prompts import all_prompts, encode_prompts
from ...linvideo_core.models import attention_sites
from ...linvideo_core.models.base_weights import digested_weights, keep_base_weights
from ...linvideo_core.models.families import identify
from ...linvideo_core.models.velocity import TIMESTEP_SCALE
from ...linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts, split_prompts
from ...linvideo_core.run.memory import (
    FP32,
    Need,
    Transformer,
    check_capacity,
    count,
    count_low_rank,
    training_needs,
)
from ...linvideo_core.teacher.teacher import Teacher
from ...linvideo_core.transfer.config import StudentConfig, TransferConfig
from ..demo import DemoLatents
from ..patching.apply import untouched
from ..patching.base_weights import describe_base
from ..patching.families import host_family
from ..patching.weight_patches import is_plain
from . import digests
from .conditioning import Conditions, encode_for_demo, encode_prompt_list, read_conditions
from .frozen_weights import freeze
from .host_model import HostModel

COPIED_BYTES = 64e6
"""A model that is no larger in fp32 is trained on copies of its weights, in fp32."""

_EVERY_PROMPT = 5
"""Of LinVideo's 300 prompts a node learns with each fifth: more than it makes videos, as a rule."""

TRAINABLE_SINCE = "0.25"
"""The first ComfyUI that was tried; `in_training` makes its operations have a backward pass."""


class HostTeacher:
    """Everything a transfer needs to know of a MODEL and of what is connected beside it.

    sites: its self-attention layers; video: what it makes; shift: of its noise levels.

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
        self.shapes = attention_sites.shapes_of(diffusion_model)
        self.known, self.sites = identify(self.shapes)
        self.family = known = host_family(self.known.name)
        for site in self.sites:
            known.check(diffusion_model.get_submodule(site.name))
        self.model = model
        self.device: torch.device = model.load_device
        self.latent_format = model.model.latent_format
        self.is_demo = isinstance(self.latent_format, DemoLatents)
        self.shift = _find_shift(model.get_model_object("model_sampling"))
        self.video = known.video.find(model, inputs)
        self.conditions = self._find_conditions(inputs)

    def weights_digest(self) -> str:
        """Return 16 hex digits that tell these weights, and patches on them, from others."""
        digest = hashlib.blake2b(digest_size=8)
        diffusion_model = self.model.model.diffusion_model
        for name in digested_weights(diffusion_model, self.sites):
            # Where patches are merged in, the weight itself waits in the backup.
            backup = self.model.backup.get(f"diffusion_model.{name}")
            kept = diffusion_model.get_parameter(name) if backup is None else backup.weight
            dtype = _kept_dtype(diffusion_model, name)
            digests.add(digest, kept.to(dtype) if is_plain(kept) else kept)
        for key in sorted(self.model.patches, key=str):
            digests.add(digest, key)
            digests.add(digest, self.model.patches[key])
        return digest.hexdigest()

    @contextlib.contextmanager
    def teacher(self, config: TransferConfig) -> Iterator[Teacher]:
        """Load the model, and lend a twin of it that can be trained, for a while.

        Raises ValueError, in one sentence, where a transfer with these settings cannot fit.
        """
        needs = self.needs(config)
        self._check_fits(needs)
        # The weights are ComfyUI's: what of them does not fit beside the rest waits elsewhere.
        beside = sum(need.num_bytes for need in needs[1:])
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.model], memory_required=beside)
        was_in_training = comfy.model_management.in_training
        # ComfyUI's own way to say: operations that have a backward pass, please.
        comfy.model_management.in_training = True
        try:
            yield self._make_subject(self.is_copied(config))
        finally:
            comfy.model_management.in_training = was_in_training

    def _make_subject(self, is_copied: bool) -> Teacher:
        base_model = self.model.model
        twin = freeze(base_model.diffusion_model, self.device, is_copied=is_copied)
        dtype = torch.float32 if is_copied else self.training_dtype
        model = HostModel(
            twin,
            self.sites,
            self.conditions,
            dtype=dtype,
            family=self.family,
            video=self.video,
            timestep_scale=base_model.model_sampling.multiplier / TIMESTEP_SCALE,
        )
        base = describe_base(self.model)
        keep_base_weights(model, base)
        return Teacher(
            name=_name(self.model, self.is_demo),
            model=model,
            prompts=[f"prompt {i}" for i in range(len(self.conditions.prompt_embeds))],
            prompt_embeds=self.conditions.prompt_embeds.to(self.device, dtype),
            negative_embeds=self.conditions.negative_embeds.to(self.device, dtype),
            latent_shape=self.video.latent_shape,
            size=self.video.size,
            decode=decode_latents,
            is_demo=self.is_demo,
            sampled_as=f"{self.weights_digest()} {self.conditions.digest()} {dtype}",
        )

    def is_copied(self, config: TransferConfig) -> bool:
        """Say whether a transfer trains copies in fp32, not beside the host's own weights."""
        if config.student.parameters == "full":
            return True
        return FP32 * count(self.shapes) <= COPIED_BYTES

    def needs(self, config: TransferConfig) -> list[Need]:
        """Return what a transfer needs of the device's memory at once, the weights first.

        Of weights that stay the host's, those of two blocks.
        """
        diffusion_model = self.model.model.diffusion_model
        block = attention_sites.blocks(diffusion_model, self.sites)[0]
        first = self.sites[0].name.rpartition(".")[0]
        is_copied = self.is_copied(config)
        student = config.student
        site = self.sites[0]
        ffn_dim, dim = self.shapes[first + self.known.feed_forward]
        num_maps = len(self.sites) * site.num_heads * site.head_dim**2 * student.feature_ratio
        return training_needs(
            Transformer(
                dim=dim,
                ffn_dim=ffn_dim,
                num_layers=len(self.sites),
                num_tokens=self.video.count_tokens(self.conditions.negative_embeds.shape[0]),
                stream_bytes=FP32 if is_copied else self.training_dtype.itemsize,
            ),
            weight_bytes=FP32 * count(self.shapes) if is_copied else 2 * module_size(block),
            num_trained=num_maps + self._count_trained(student),
            num_graphs=1,
            batch_size=config.training.batch_size,
            sampled_together=config.trajectories.shard_size,
            is_checkpointed=config.training.activation_checkpointing,
            precision=config.precision,
        )

    def _count_trained(self, student: StudentConfig) -> int:
        shapes = self.known.trainable(self.shapes)
        if student.parameters == "lora":
            return count_low_rank(shapes, "", student.lora_rank)
        return count(shapes) if student.parameters == "full" else 0

    def _check_fits(self, needs: list[Need]) -> None:
        """Raise ValueError, in one sentence, where needs exceed what the device has at all.

        Whatever ComfyUI holds there now, it gives way.
        """
        total = comfy.model_management.get_total_memory(self.device)
        usable = total - comfy.model_management.extra_reserved_memory()
        check_capacity(needs, self.device, usable)

    @property
    def training_dtype(self) -> torch.dtype:
        """In which a twin computes whose weights stay the host's; gradients overflow in fp16."""
        has_bf16 = comfy.model_management.should_use_bf16(self.device)
        return torch.bfloat16 if has_bf16 and self.device.type != "cpu" else torch.float32

    def _find_conditions(self, inputs: dict[str, Any]) -> Conditions:
        branches = {name: inputs.get(name) for name in ("positive", "negative")}
        prompts = split_prompts(inputs.get("prompts") or "")
        if prompts and branches["positive"] is not None:
            raise ValueError(
                "prompts are listed and positive is connected, but one of the two is needed: "
                "empty the list or disconnect positive"
            )
        clip = inputs.get("clip")
        if clip is not None and not self.is_demo:
            if branches["negative"] is None:
                branches["negative"] = encode_prompt_list([NEGATIVE_PROMPT], clip)
            if not prompts and branches["positive"] is None:
                prompts = default_prompts()[::_EVERY_PROMPT]
        if prompts:
            branches["positive"] = self._encode(prompts, clip, branches["negative"])
        if self.is_demo:
            texts = {"positive": all_prompts(), "negative": [""]}
            for name, found in branches.items():
                if found is None:
                    branches[name] = [[encode_prompts(texts[name]), {}]]
        for name, found in branches.items():
            if found is None:
                raise ValueError(
                    f"{name} is not connected: connect a text encoder's CONDITIONING; several "
                    "positive prompts are combined, or listed in prompts; with clip alone, those "
                    "that come with LinVideo are learned with"
                )
        if self.family.refines_prompts:
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([self.model])
        device = self.device if self.family.refines_prompts else "cpu"
        self._check_width(branches)
        return read_conditions(self.model.model, *branches.values(), self.video, device)

    def _check_width(self, branches: dict[str, Any]) -> None:
        """Raise ValueError for prompts that another text encoder has encoded."""
        if self.known.prompts not in self.shapes:
            return
        width = self.shapes[self.known.prompts][1]
        for name, entries in branches.items():
            if other := [rows.shape[-1] for rows, _ in entries if rows.shape[-1] != width]:
                raise ValueError(
                    f"{name} is {other[0]} numbers wide, but this model takes {width}: connect the "
                    "text encoder that belongs to it"
                )

    def _encode(self, prompts: list[str], clip: Any, negative: list[Any] | None) -> list[Any]:
        if self.is_demo:
            return encode_for_demo(prompts)
        others = dict(negative[0][1]) if negative else {}
        encoded = encode_prompt_list(prompts, clip)
        return [[embeds, {**others, **options}] for embeds, options in encoded]


def _kept_dtype(model: nn.Module, name: str) -> torch.dtype:
    """Return in which dtype ComfyUI keeps a plain parameter once it was used.

    With dynamic memory it is the file's until then: a run that goes on must know it again.
    """
    owner, _, leaf = name.rpartition(".")
    dtype = getattr(model.get_submodule(owner), f"{leaf}_comfy_model_dtype", None)
    return dtype or model.get_parameter(name).dtype


def _find_shift(model_sampling: Any) -> float:
    is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if not is_flow or not isinstance(
        model_sampling, comfy.model_sampling.ModelSamplingDiscreteFlow
    ):
        raise ValueError(
            "this model's sampling is no shifted flow, which a transfer needs: connect the model "
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
