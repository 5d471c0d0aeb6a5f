"""The teacher of a transfer: a frozen model, and the prompts and latents it is sampled with."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import demo
from ..demo.codec import LATENT_SHAPE, SPACE_PATCH, TIME_PATCH, decode_latents
from ..demo.prompts import all_prompts, encode_prompts
from ..models.attention_sites import blocks, shapes_of
from ..models.base_weights import base_weights_of, keep_base_weights, weights_digest
from ..models.checkpoint import Checkpoint, load_wan, open_wan
from ..models.experts import parts_of
from ..models.families import identify
from ..models.quantized import FrozenConfig
from ..prompts import read_prompts
from ..prompts.sources import PromptConfig, PromptSource, find_source
from ..run.config import option, positive
from ..run.context import Run
from ..run.errors import SettingError
from ..training.offload import offload

_TIME_COMPRESSION = 4
# Pixels a latent, by channels: 48 are those of Wan 2.2's 5B, 16 any other Wan's.
_SPACE_COMPRESSION = {16: 8, 48: 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which model, with which prompts, at which size."""

    model: Path | None = option(None, "Wan text-to-video safetensors; none: the embedded model")
    prompts: Path | None = option(
        None, "prompts, one a line, or a safetensors file of embeddings; none: those of LinVideo"
    )
    text: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    num_frames: int = option(81, "video frames, for a --model of your own")
    height: int = option(480, "video height in pixels, for a --model of your own")
    width: int = option(832, "video width in pixels, for a --model of your own")

    def __post_init__(self) -> None:
        positive(self, "num_frames", "height", "width")
        if (self.num_frames - 1) % _TIME_COMPRESSION:
            raise SettingError(
                f"{{num_frames}} {self.num_frames} given; 4 n + 1 is needed, such as 81",
                "num_frames",
            )
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise SettingError(
                    f"{{{name}}} {getattr(self, name)} given; a multiple of 16 is needed", name
                )
        if self.model is None and self.frozen_weights.given:
            raise SettingError(
                f"{self.frozen_weights.given} is for a {{model}} of your own, and none was "
                "given: give {model}, or leave it out",
                "model",
            )


@dataclasses.dataclass(kw_only=True)
class Teacher:
    """A teacher ready to be sampled.

    prompt_embeds: [P, S, T]; negative_embeds: [S, T], the unconditional branch's prompt.
    latent_shape: (C, F, H, W).
    decode: latents [B, C, F, H, W] -> grey frames [B, F, h, w] in [0, 1].
    offload_blocks: first blocks whose weights stay in CPU memory when the teacher moves.
    sampled_as: what decides its samples beside all this and a digest of its weights, such as how
        the weights are held or an image that its videos start from.
    size: frames, height and width of the video in pixels, where latents do not tell it Wan's way.
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
    def video_size(self) -> tuple[int, int, int]:
        """Return frames, height and width in pixels of the video that the latents stand for."""
        if self.size is not None:
            return self.size
        C, F, H, W = self.latent_shape
        if self.is_demo:
            return TIME_PATCH * F, SPACE_PATCH * H, SPACE_PATCH * W
        ratio = _SPACE_COMPRESSION.get(C, 8)
        return _TIME_COMPRESSION * (F - 1) + 1, ratio * H, ratio * W

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the teacher and its prompts; once, where blocks are offloaded."""
        if self.offload_blocks:
            _, sites = identify(shapes_of(self.model))
            offload(self.model, blocks(self.model, sites)[: self.offload_blocks], device)
        else:
            self.model.to(device)
        return dataclasses.replace(
            self,
            prompt_embeds=self.prompt_embeds.to(device),
            negative_embeds=self.negative_embeds.to(device),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """A checkpoint with its prompts, of which only the headers were read and checked so far."""

    checkpoint: Checkpoint
    source: PromptSource
    latent_shape: tuple[int, int, int, int]
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's parameter shapes, the form in which families recognise it."""
        return {name: tensor.shape for name, tensor in self.checkpoint.tensors.items()}

    def load(self, run: Run) -> Teacher:
        """Return the teacher on the CPU, frozen, its weights held as the config says.

        Prompts that must be encoded are: on the run's device, into its folder, before the model is
        read.
        """
        embeds = self.source.read(run.folder, device=run.device, callbacks=run.callbacks)
        return Teacher(
            name=self.checkpoint.path.stem,
            model=self.load_model(),
            prompts=embeds.prompts,
            prompt_embeds=embeds.prompt_embeds,
            negative_embeds=embeds.negative_embeds,
            latent_shape=self.latent_shape,
            decode=_preview,
            is_demo=False,
            offload_blocks=self.frozen_weights.offload_blocks,
            sampled_as=self.frozen_weights.frozen,
        )

    def load_model(self) -> nn.Module:
        """Return the model alone, on the CPU, frozen, with the unrounded weights' digest."""
        model = self.checkpoint.load(frozen=self.frozen_weights.frozen).eval().requires_grad_(False)
        if self.frozen_weights.frozen != "fp32":
            family, sites = identify(self.shapes)
            whole = self.checkpoint.load(under=[f"{site.name}." for site in (sites[0], sites[-1])])
            keep_base_weights(model, base_weights_of(whole, family, sites))
        return model


def open_teacher(config: TeacherConfig) -> TeacherCheckpoint | None:
    """Read the headers of all that a checkpoint needs; None for the embedded model.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that does not fit.
    """
    if config.model is None:
        if config.text != PromptConfig():
            raise ValueError(
                "--text-encoder, --tokenizer or --negative-prompt was given without --model; the "
                "embedded model has its own words"
            )
        return None
    source = find_source(config.prompts, config.text)
    checkpoint = open_wan(config.model)
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
    ratio = _SPACE_COMPRESSION.get(checkpoint.config.in_channels, 8)
    for name in ("height", "width"):
        if getattr(config, name) % (2 * ratio):
            raise SettingError(
                f"{{{name}}} {getattr(config, name)} given; {config.model} needs a multiple of "
                f"{2 * ratio}",
                name,
            )
    return TeacherCheckpoint(
        checkpoint=checkpoint,
        source=source,
        latent_shape=(
            checkpoint.config.in_channels,
            (config.num_frames - 1) // _TIME_COMPRESSION + 1,
            config.height // ratio,
            config.width // ratio,
        ),
        frozen_weights=config.frozen_weights,
    )


def load_teacher(config: TeacherConfig | TeacherCheckpoint, run: Run | None = None) -> Teacher:
    """Load the embedded model or the one that `config` names, frozen, on the CPU.

    run: where prompts are encoded, see `TeacherCheckpoint.load`.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that does not fit.
    """
    found = config if isinstance(config, TeacherCheckpoint) else open_teacher(config)
    return _load_demo(config.prompts) if found is None else found.load(run or Run())


def _load_demo(prompts_path: Path | None) -> Teacher:
    prompts = all_prompts() if prompts_path is None else read_prompts(prompts_path)
    model = load_wan(demo.weights_path("model.safetensors"))
    return Teacher(
        name="demo",
        model=model.eval().requires_grad_(False),
        prompts=prompts,
        prompt_embeds=encode_prompts(prompts),
        negative_embeds=encode_prompts([""])[0],
        latent_shape=LATENT_SHAPE,
        decode=decode_latents,
        is_demo=True,
    )


def _preview(latents: Tensor) -> Tensor:
    """Show latents without a decoder: the mean channel, clipped at two standard deviations."""
    grey = latents.float().mean(dim=1)
    spread = grey.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return ((grey - grey.mean(dim=(1, 2, 3), keepdim=True)) / (4 * spread) + 0.5).clamp(0, 1)
