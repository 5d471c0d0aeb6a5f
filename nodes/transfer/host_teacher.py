"""A graph's MODEL as the teacher of a transfer: what it is, and a copy that can be trained.

The MODEL itself is only looked at, and lends the copy its weights: see `host_model`.
"""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.model_management import module_size
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...linvideo_core.demo.codec import decode_latents
from ...linvideo_core.flow import TIMESTEP_SCALE
from ...linvideo_core.kernels.tiles import Size
from ...linvideo_core.models import attention_sites
from ...linvideo_core.models.base_weights import digested_weights, keep_base_weights
from ...linvideo_core.models.families import identify
from ...linvideo_core.run.memory import (
    FP32,
    Need,
    Transformer,
    check_memory,
    count,
    count_low_rank,
    show_gb,
    training_needs,
)
from ...linvideo_core.teacher.teacher import Teacher
from ...linvideo_core.transfer.config import StudentConfig, TransferConfig
from ..demo import DemoLatents
from ..patching.apply import untouched
from ..patching.families import host_family
from ..patching.weights import describe_base, is_plain, kept_dtype, original_weight
from .conditioning import digest_of, find_conditions
from .host_model import HostModel, freeze

COPIED_BYTES = 64e6
"""A model that is no larger in fp32 is trained on copies of its weights, in fp32."""


# NVIDIA's cards for which PyTorch takes cuDNN's attention first: Hopper, and Blackwell for servers.
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))


@contextlib.contextmanager
def attention_order(device: torch.device) -> Iterator[None]:
    """Let PyTorch take cuDNN's attention first where it does so in a process without ComfyUI.

    PyTorch decides it at a process's first attention. ComfyUI makes that one inside an order of its
    own, FlashAttention first, and what it finds and restores around it is not yet PyTorch's choice.
    """
    is_nvidia = device.type == "cuda" and not torch.version.hip
    can_order = "set_priority" in inspect.signature(sdpa_kernel).parameters
    if not (is_nvidia and can_order and torch.cuda.get_device_capability(device) in _CUDNN_FIRST):
        yield
        return
    others = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True):
        yield


@contextlib.contextmanager
def host_in_training() -> Iterator[None]:
    """Let ComfyUI take operations that have a backward pass, and leave memory to PyTorch.

    The compiler of newer ones plans memory from block to block of a model, in which it takes it for
    an error that a block of ours gives new tensors.
    """
    management, args = comfy.model_management, comfy.cli_args.args
    with contextlib.ExitStack() as undo:
        for owner, name in ((management, "in_training"), (args, "disable_comfy_compiler")):
            if hasattr(owner, name):
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, True)
        yield


class HostTeacher:
    """Everything a transfer needs to know of a MODEL and of what is connected beside it.

    sites: its self-attention layers; video: what it makes; shift: of its noise levels;
    conditions: the prompts, and what else it is called with.

    Raises ValueError for what cannot be trained.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        """inputs: by name, see `read_transfer_inputs`: prompts and size are read here."""
        diffusion_model = untouched(model)
        self.shapes = attention_sites.shapes_of(diffusion_model)
        self.known, self.sites = identify(self.shapes)
        self.family = host_family(self.known.name)
        for site in self.sites:
            self.family.check(diffusion_model.get_submodule(site.name))
        self.model = model
        self.device: torch.device = model.load_device
        self.latent_format = model.model.latent_format
        self.is_demo = isinstance(self.latent_format, DemoLatents)
        self.shift = _find_shift(model.get_model_object("model_sampling"))
        self.video = self.family.video.find(model, inputs)
        self._check_size()
        prompts = self.shapes.get(self.known.prompts)
        self.conditions = find_conditions(
            model,
            inputs,
            self.video,
            is_demo=self.is_demo,
            width=prompts and prompts[1],
            refines_prompts=self.family.refines_prompts,
        )

    @property
    def grid(self) -> Size:
        """The (frames, height, width) in tokens of its videos, where `has_known_grid`."""
        size = self.video.picture_shape[1:]
        inputs = self.conditions.inputs
        return self.family.find_grid(self.model.model.diffusion_model, size, inputs).size

    @property
    def has_known_grid(self) -> bool:
        """Whether LinVideo knows where the model has the video's tokens."""
        return self.family.knows_grid(self.model.model.diffusion_model)

    def weights_digest(self) -> str:
        """Return 16 hex digits that tell these weights, and patches on them, from others."""
        return digest_of(self._digested())

    def _digested(self) -> Iterator[Any]:
        for name in digested_weights(self.model.model.diffusion_model, self.sites):
            kept = original_weight(self.model, name)
            # A run that goes on must know the weight again, whether or not it was used yet.
            yield kept.to(kept_dtype(self.model, name)) if is_plain(kept) else kept
        for key in sorted(self.model.patches, key=str):
            yield from (key, self.model.patches[key])

    @contextlib.contextmanager
    def teacher(self, config: TransferConfig) -> Iterator[Teacher]:
        """Load the model, and lend a copy of it that can be trained, while the context lasts.

        Raises ValueError where a transfer with these settings cannot fit.
        """
        needs = self.needs(config)
        check_memory(needs, self.device, free=self._usable_bytes())
        # The weights are ComfyUI's: what of them does not fit beside the rest waits elsewhere.
        beside = sum(need.num_bytes for need in needs[1:])
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.model], memory_required=beside)
        with host_in_training(), attention_order(self.device):
            yield self._make_teacher(self.is_copied(config))

    def _make_teacher(self, is_copied: bool) -> Teacher:
        base_model = self.model.model
        dtype = torch.float32 if is_copied else self.training_dtype
        model = HostModel(
            freeze(base_model.diffusion_model, self.device, is_copied=is_copied),
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

    @property
    def training_dtype(self) -> torch.dtype:
        """In which a copy computes whose weights stay ComfyUI's; gradients overflow in fp16."""
        has_bf16 = comfy.model_management.should_use_bf16(self.device)
        return torch.bfloat16 if has_bf16 and self.device.type != "cpu" else torch.float32

    def needs(self, config: TransferConfig) -> list[Need]:
        """Return what a transfer needs of the device's memory at once, the weights first.

        Of weights that stay ComfyUI's, those of two blocks.
        """
        is_copied, student, site = self.is_copied(config), config.student, self.sites[0]
        block = attention_sites.blocks(self.model.model.diffusion_model, self.sites)[0]
        num_maps = len(self.sites) * site.num_heads * site.head_dim**2 * student.feature_ratio
        return training_needs(
            self._sizes(is_copied, len(self.conditions.negative_embeds)),
            weight_bytes=FP32 * count(self.shapes) if is_copied else 2 * module_size(block),
            num_trained=num_maps + self._count_trained(student),
            batch_size=config.training.batch_size,
            sampled_together=config.trajectories.shard_size,
            is_checkpointed=config.training.activation_checkpointing,
            precision=config.precision,
        )

    def _sizes(self, is_copied: bool, num_prompt_tokens: int) -> Transformer:
        block = self.sites[0].name.rpartition(".")[0]
        ffn_dim, dim = self.shapes[block + self.known.feed_forward]
        return Transformer(
            dim=dim,
            ffn_dim=ffn_dim,
            num_layers=len(self.sites),
            num_tokens=self.video.count_tokens(num_prompt_tokens),
            stream_bytes=FP32 if is_copied else self.training_dtype.itemsize,
        )

    def _count_trained(self, student: StudentConfig) -> int:
        shapes = self.known.trainable(self.shapes)
        if student.parameters == "lora":
            return count_low_rank(shapes, "", student.lora_rank)
        return count(shapes) if student.parameters == "full" else 0

    def _check_size(self) -> None:
        """Raise ValueError where one video is too large to learn from, whatever the settings.

        Before prompts are encoded, which for some models takes memory for a whole video.
        """
        sizes = self._sizes(False, 0)
        least = {"weight_bytes": 0, "num_trained": 0, "batch_size": 1}
        settings = {"sampled_together": 1, "is_checkpointed": True, "precision": "bf16"}
        needed = sum(need.num_bytes for need in training_needs(sizes, **least, **settings))
        usable = self._usable_bytes()
        if needed > usable:
            raise ValueError(
                f"videos of {sizes.num_tokens:,} tokens need at least {show_gb(needed)} to learn "
                f"from, and {self.device} has {show_gb(usable)}: lower width, height or frames; "
                f"about {int(sizes.num_tokens * usable / needed):,} tokens fit, "
                f"{needed / usable:,.1f} times fewer"
            )

    def _usable_bytes(self) -> int:
        """Return what the device has in all: whatever ComfyUI holds there now, it gives way."""
        total = comfy.model_management.get_total_memory(self.device)
        return total - comfy.model_management.extra_reserved_memory()


def _find_shift(model_sampling: Any) -> float:
    kinds = (comfy.model_sampling.CONST, comfy.model_sampling.ModelSamplingDiscreteFlow)
    if not all(isinstance(model_sampling, kind) for kind in kinds):
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
