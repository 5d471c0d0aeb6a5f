"""The teacher of a transfer: a frozen model, and the prompts and latents it is sampled with."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import demo
from ..demo.codec import LATENT_SHAPE, SPACE_PATCH, TIME_PATCH, decode_latents
from ..demo.prompts import all_prompts, encode_prompts
from ..kernels.softmax import why_not
from ..models.attention import SoftmaxAttention
from ..models.attention_sites import blocks, install, shapes_of
from ..models.base_weights import base_weights_of, keep_base_weights, weights_digest
from ..models.checkpoint import Checkpoint, open_wan
from ..models.config import FROZEN, FrozenConfig, SoftmaxConfig
from ..models.experts import parts_of
from ..models.families import identify
from ..models.image_condition import CLIP_TOKENS, NO_IMAGE, with_numbers
from ..models.quantized import count_frozen_bytes
from ..prompts import read_prompts
from ..prompts.config import PromptConfig
from ..prompts.embeddings import PromptEmbeds
from ..prompts.sources import PromptSource, StoredPrompts, find_source
from ..run.context import Run
from ..run.errors import SettingError
from ..run.memory import Need, check_memory
from ..training.offload import offload
from .config import TIME_COMPRESSION, TeacherConfig

# Pixels a latent, by channels: 48 are those of Wan 2.2's 5B, 16 any other Wan's.
_SPACE_COMPRESSION = {16: 8, 48: 16}


@dataclasses.dataclass(kw_only=True)
class Teacher:
    """A teacher ready to be sampled.

    prompt_embeds: [P, S, T]; negative_embeds: [S, T], the unconditional branch's prompt, of which
        `negatives_for` makes what the model takes.
    all_negatives: [K, S, T], where a pool's videos have several; `negative_embeds` is the first.
    latent_shape: (C, F, H, W); more_shapes: those of other sizes that a pool's videos have.
    decode: latents [B, C, F, H, W] -> grey frames [B, F, h, w] in [0, 1].
    offload_blocks: first blocks whose weights stay in CPU memory when the teacher moves.
    sampled_as: what decides its samples beside all this and a digest of its weights, such as how
        the weights are held or an image that its videos start from.
    size: frames, height and width of the video in pixels, where latents do not tell it Wan's way.
    has_images: whether each prompt has an image of its own, see `models.image_condition`.
    """

    name: str
    model: nn.Module
    prompts: list[str]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    latent_shape: tuple[int, int, int, int]
    decode: Callable[[Tensor], Tensor]
    is_demo: bool
    offload_blocks: int = 0
    sampled_as: str = ""
    size: tuple[int, int, int] | None = None
    has_images: bool = False
    more_shapes: tuple[tuple[int, int, int, int], ...] = ()
    all_negatives: Tensor | None = None

    def negatives_for(self, prompt_embeds: Tensor, picks: Tensor | None = None) -> Tensor:
        """Return the negative prompt [B, S, T] beside each of some prompts [B, S, T].

        picks: [B] int64, which of all negatives each has; none: the first.
        """
        negatives = self.negative_embeds.expand_as(prompt_embeds)
        if picks is not None and self.all_negatives is not None:
            negatives = self.all_negatives[picks]
        if not self.has_images:
            return negatives
        return torch.cat([negatives[:, :-1], prompt_embeds[:, -1:]], dim=1)

    def describe(self) -> dict[str, Any]:
        """Return what tells the teacher, its prompts and its size from others, as JSON holds it."""
        prompts = hashlib.blake2b(digest_size=8)
        for embeds in (self.prompt_embeds, self.negative_embeds):
            prompts.update(embeds.cpu().half().numpy().tobytes())
        parts = parts_of(self.model)
        digests = [weights_digest(part, identify(shapes_of(part))[1]) for part in parts]
        return {
            "model": self.name,
            "weights": "+".join(digests),
            "sampled_as": self.sampled_as,
            "prompts": prompts.hexdigest(),
            "latent_shape": list(self.latent_shape),
        }

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The latent shapes of all sizes, the main one first."""
        return self.latent_shape, *self.more_shapes

    @property
    def video_size(self) -> tuple[int, int, int]:
        """Return frames, height and width in pixels of the video that the latents stand for."""
        return self.size or self.measure(self.latent_shape)

    def measure(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return frames, height and width in pixels of a video whose latents are (C, F, H, W)."""
        C, F, H, W = latent_shape
        if self.is_demo:
            return TIME_PATCH * F, SPACE_PATCH * H, SPACE_PATCH * W
        ratio = _SPACE_COMPRESSION.get(C, 8)
        return TIME_COMPRESSION * (F - 1) + 1, ratio * H, ratio * W

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the teacher and its prompts; once, where blocks are offloaded."""
        if self.offload_blocks:
            _, sites = identify(shapes_of(self.model))
            offload(self.model, blocks(self.model, sites)[: self.offload_blocks], device)
        else:
            self.model.to(device)
        return self.with_prompts_on(device)

    def with_prompts_on(self, device: torch.device | str) -> "Teacher":
        """Return the teacher with its prompts on a device, and the model where it was."""
        names = ("prompt_embeds", "negative_embeds", "all_negatives")
        found = {name: getattr(self, name) for name in names}
        moved = {name: tensor.to(device) for name, tensor in found.items() if tensor is not None}
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """A checkpoint with its prompts, of which only the headers were read and checked so far.

    latent_shape, more_shapes: see `Teacher`. is_demo: whether it is the embedded model.
    """

    checkpoint: Checkpoint
    source: PromptSource
    latent_shape: tuple[int, int, int, int]
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    softmax: SoftmaxConfig = dataclasses.field(default_factory=SoftmaxConfig)
    is_demo: bool = False
    more_shapes: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's parameter shapes, the form in which families recognise it."""
        return {name: tensor.shape for name, tensor in self.checkpoint.tensors.items()}

    def check_softmax(self, device: str, precision: str) -> None:
        """Raise SettingError where the chosen kernel cannot compute this model's softmax layers.

        Nor their gradient, where gradients are enabled.
        """
        kernel = self.softmax.softmax_kernel
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        _, sites = identify(self.shapes)
        if reason := why_not(kernel, torch.device(device), sites[0].head_dim, dtype):
            raise SettingError(
                f"{{softmax_kernel}} {kernel} given, and {reason}", "softmax_kernel", "precision"
            )

    def load(self, run: Run) -> Teacher:
        """Return the teacher on the CPU, frozen, its weights held as the config says.

        Prompts that must be encoded are: on the run's device, into its folder, before the model is
        read.
        """
        embeds = self.source.read(run.folder, device=run.device, callbacks=run.callbacks)
        prompt_embeds, negatives = embeds.prompt_embeds, embeds.negative_embeds
        negatives = negatives.reshape(-1, *negatives.shape[-2:])
        condition = self.source.condition
        has_images = condition is not None and condition.is_numbered
        if has_images:
            prompt_embeds = with_numbers(prompt_embeds, torch.arange(len(prompt_embeds)))
            # `negatives_for` puts an image in its place.
            negatives = with_numbers(negatives, torch.full((len(negatives),), NO_IMAGE))
        sampled_as = "" if self.is_demo else self.frozen_weights.frozen
        return Teacher(
            name="demo" if self.is_demo else self.checkpoint.path.stem,
            model=self.load_model(),
            prompts=embeds.prompts,
            prompt_embeds=prompt_embeds,
            negative_embeds=negatives[0],
            latent_shape=self.latent_shape,
            decode=decode_latents if self.is_demo else _preview,
            is_demo=self.is_demo,
            offload_blocks=self.frozen_weights.offload_blocks,
            sampled_as=f"{sampled_as} {condition.digest()}" if condition else sampled_as,
            has_images=has_images,
            more_shapes=self.more_shapes,
            all_negatives=negatives if len(negatives) > 1 else None,
        )

    def load_model(self) -> nn.Module:
        """Return the model alone, on the CPU, frozen, with the unrounded weights' digest.

        Raises SettingError where the computer's memory is too small for it.
        """
        frozen = self.frozen_weights.frozen
        advice = "choose a smaller model or a machine with more memory"
        if frozen != FROZEN[-1]:
            advice = f"give {{frozen}} {FROZEN[-1]}, or {advice}"
        held = Need("the model while it is read", count_frozen_bytes(self.shapes, frozen))
        check_memory([held], "cpu", advice)
        model = self.checkpoint.load(frozen=frozen).eval().requires_grad_(False)
        if frozen != "fp32":
            family, sites = identify(self.shapes)
            whole = self.checkpoint.load(under=[f"{site.name}." for site in (sites[0], sites[-1])])
            keep_base_weights(model, base_weights_of(whole, family, sites))
        model.condition = self.source.condition
        if not self.softmax.is_sparse:
            _, sites = identify(self.shapes)
            install(model, sites, lambda _: SoftmaxAttention(self.softmax.softmax_kernel))
        return model


def open_teacher(
    config: TeacherConfig, more_sizes: Sequence[Mapping[str, int]] = ()
) -> TeacherCheckpoint:
    """Read the headers of all that a teacher needs; without `model` it is the embedded one.

    more_sizes: other sizes of video, see `PoolConfig.sizes`.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that does not fit.
    """
    if config.model is None:
        if config.text != PromptConfig():
            raise SettingError(
                "{text_encoder}, {tokenizer} or {negative_prompt} was given without {model}; the "
                "embedded model has its own words",
                "text_encoder",
                "tokenizer",
                "negative_prompt",
                "model",
            )
        return _open_demo(config)
    checkpoint = open_wan(config.model)
    source = find_source(config.prompts, config.text)
    if source.width != checkpoint.config.text_dim:
        raise ValueError(
            f"{source.path} {source.verb} embeddings of width {source.width}; "
            f"{config.model} takes {checkpoint.config.text_dim}"
        )
    if config.frozen_weights.offload_blocks > checkpoint.config.num_layers:
        raise SettingError(
            f"{{offload_blocks}} {config.frozen_weights.offload_blocks} given; {config.model} has "
            f"{checkpoint.config.num_layers} blocks",
            "offload_blocks",
        )
    num_channels = checkpoint.config.out_channels
    latent_shape = _find_latent_shape(config, num_channels)
    _check_condition(source, checkpoint, latent_shape)
    if more_sizes and source.condition is not None:
        raise SettingError(
            f"{{more_sizes}} was given with {config.model}, whose videos start from images of one "
            "size: leave it out",
            "more_sizes",
        )
    return TeacherCheckpoint(
        checkpoint=checkpoint,
        source=source,
        latent_shape=latent_shape,
        frozen_weights=config.frozen_weights,
        softmax=config.softmax,
        more_shapes=_find_more_shapes(config, num_channels, more_sizes),
    )


def _find_latent_shape(config: TeacherConfig, num_channels: int) -> tuple[int, int, int, int]:
    ratio = _SPACE_COMPRESSION.get(num_channels, 8)
    for name in ("height", "width"):
        if getattr(config, name) % (2 * ratio):
            raise SettingError(
                f"{{{name}}} {getattr(config, name)} given; {config.model} needs a multiple of "
                f"{2 * ratio}",
                name,
            )
    num_frames = (config.num_frames - 1) // TIME_COMPRESSION + 1
    return num_channels, num_frames, config.height // ratio, config.width // ratio


def _find_more_shapes(
    config: TeacherConfig, num_channels: int, more_sizes: Sequence[Mapping[str, int]]
) -> tuple[tuple[int, int, int, int], ...]:
    found = [_find_latent_shape(config, num_channels)]
    for size in more_sizes:
        try:
            shape = _find_latent_shape(dataclasses.replace(config, **size), num_channels)
        except SettingError as error:
            raise SettingError(f"{{more_sizes}}: {error.worded(str)}", "more_sizes") from None
        if shape in found:
            raise SettingError(
                f"{{more_sizes}} {'x'.join(map(str, size.values()))} given, which is there "
                "already, as {width}, {height} and {num_frames} or in {more_sizes}: leave it out",
                "more_sizes",
                "width",
                "height",
                "num_frames",
            )
        found.append(shape)
    return tuple(found[1:])


def _check_condition(
    source: PromptSource, checkpoint: Checkpoint, latent_shape: tuple[int, int, int, int]
) -> None:
    """Raise SettingError where there are no images that the model takes, or others."""
    wan, found = checkpoint.config, source.condition
    needed = {}
    if wan.condition_channels:
        needed["condition_latents"] = [wan.condition_channels, *latent_shape[1:]]
    if wan.image_dim:
        needed["clip_embeds"] = [CLIP_TOKENS, wan.image_dim]
    given = {}
    if found is not None:
        given["condition_latents"] = list(found.latents.shape[1:])
        if found.clip_embeds is not None:
            given["clip_embeds"] = list(found.clip_embeds.shape[1:])
    if given != needed:
        kind = "image-to-video" if wan.condition_channels else "text-to-video"
        raise SettingError(
            f"{checkpoint.path} is {kind} and takes {_list_shapes(needed)} at this size, and "
            f"{source.path} {source.verb} {_list_shapes(given)}: give {{prompts}} a file that "
            "LinVideo Export Prompts wrote for this model and size",
            "prompts",
            "model",
        )


def _list_shapes(shapes: dict[str, list[int]]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no image"


def load_teacher(config: TeacherConfig, run: Run | None = None) -> Teacher:
    """Load the embedded model or the one that `config` names, frozen, on the CPU.

    run: where prompts are encoded, see `TeacherCheckpoint.load`.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that does not fit.
    """
    return open_teacher(config).load(run or Run())


def _open_demo(config: TeacherConfig) -> TeacherCheckpoint:
    prompts = all_prompts() if config.prompts is None else read_prompts(config.prompts)
    path = demo.weights_path("model.safetensors")
    embeds = PromptEmbeds(
        prompts=prompts,
        prompt_embeds=encode_prompts(prompts),
        negative_embeds=encode_prompts([""])[0],
    )
    return TeacherCheckpoint(
        checkpoint=open_wan(path),
        source=StoredPrompts(path=path, embeds=embeds),
        latent_shape=LATENT_SHAPE,
        softmax=config.softmax,
        is_demo=True,
    )


def _preview(latents: Tensor) -> Tensor:
    """Show latents without a decoder: the mean channel, clipped at two standard deviations."""
    grey = latents.float().mean(dim=1)
    spread = grey.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return ((grey - grey.mean(dim=(1, 2, 3), keepdim=True)) / (4 * spread) + 0.5).clamp(0, 1)
