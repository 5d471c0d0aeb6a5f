"""The subject of a transfer: a frozen teacher with the prompts and latents it is sampled with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import demo
from .config import option, positive
from .demo.codec import LATENT_SHAPE, decode_latents
from .demo.prompts import all_prompts, encode_prompts
from .models.checkpoint import load_wan

_TIME_COMPRESSION, _SPACE_COMPRESSION = 4, 8  # Wan's video autoencoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """Which model, with which prompts, at which size."""

    model: Path | None = option(None, "Wan text-to-video safetensors; none: the embedded model")
    prompts: Path | None = option(
        None, "prompts, one a line (embedded model), or a safetensors file of prompt embeddings"
    )
    num_frames: int = option(81, "video frames, for a --model of your own")
    height: int = option(480, "video height in pixels, for a --model of your own")
    width: int = option(832, "video width in pixels, for a --model of your own")

    def __post_init__(self) -> None:
        positive(self, "num_frames", "height", "width")
        if (self.num_frames - 1) % _TIME_COMPRESSION:
            raise ValueError(f"--num-frames {self.num_frames} given; 4 n + 1 is needed, such as 81")
        for name in ("height", "width"):
            if getattr(self, name) % (2 * _SPACE_COMPRESSION):
                raise ValueError(
                    f"--{name} {getattr(self, name)} given; a multiple of 16 is needed"
                )


@dataclasses.dataclass(kw_only=True)
class Subject:
    """A teacher ready to be sampled.

    prompt_embeds: [P, S, T]; negative_embeds: [S, T], the unconditional branch's prompt.
    latent_shape: (C, F, H, W).
    decode: latents [B, C, F, H, W] -> grey frames [B, F, h, w] in [0, 1].
    """

    name: str
    model: nn.Module
    prompts: list[str]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    latent_shape: tuple[int, int, int, int]
    decode: Callable[[Tensor], Tensor]
    is_demo: bool

    def to(self, device: torch.device | str) -> "Subject":
        """Move the teacher and its prompts."""
        return dataclasses.replace(
            self,
            model=self.model.to(device),
            prompt_embeds=self.prompt_embeds.to(device),
            negative_embeds=self.negative_embeds.to(device),
        )


def load_subject(config: SubjectConfig) -> Subject:
    """Load the embedded model or the one that `config` names, frozen, in fp32.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that does not fit.
    """
    subject = _load_demo(config.prompts) if config.model is None else _load_own(config)
    subject.model.eval().requires_grad_(False)
    return subject


def _load_demo(prompts_path: Path | None) -> Subject:
    prompts = all_prompts() if prompts_path is None else _read_lines(prompts_path)
    return Subject(
        name="demo",
        model=load_wan(demo.weights_path("model.safetensors")),
        prompts=prompts,
        prompt_embeds=encode_prompts(prompts),
        negative_embeds=encode_prompts([""])[0],
        latent_shape=LATENT_SHAPE,
        decode=decode_latents,
        is_demo=True,
    )


def _load_own(config: SubjectConfig) -> Subject:
    if config.prompts is None:
        raise ValueError(
            "--model was given without --prompts; give a safetensors file with prompt_embeds "
            "[P, S, T] and negative_embeds [S, T] from this model's text encoder"
        )
    prompt_embeds, negative_embeds = _read_embeds(config.prompts)
    model = load_wan(config.model)
    if prompt_embeds.shape[2] != model.config.text_dim:
        raise ValueError(
            f"{config.prompts} holds embeddings of width {prompt_embeds.shape[2]}; "
            f"{config.model} takes {model.config.text_dim}"
        )
    return Subject(
        name=config.model.stem,
        model=model,
        prompts=[f"prompt {i}" for i in range(len(prompt_embeds))],
        prompt_embeds=prompt_embeds,
        negative_embeds=negative_embeds,
        latent_shape=(
            model.config.in_channels,
            (config.num_frames - 1) // _TIME_COMPRESSION + 1,
            config.height // _SPACE_COMPRESSION,
            config.width // _SPACE_COMPRESSION,
        ),
        decode=_preview,
        is_demo=False,
    )


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; give prompts in UTF-8, one a line") from None
    if not any(lines):
        raise ValueError(f"{path} holds no prompts; write one a line")
    return [line for line in lines if line]


def _read_embeds(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            prompts, negative = (
                file.get_tensor(name).float() for name in ("prompt_embeds", "negative_embeds")
            )
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file with prompt_embeds and negative_embeds: {error}"
        ) from error
    if prompts.ndim != 3 or not len(prompts) or negative.shape != prompts.shape[1:]:
        raise ValueError(
            f"{path}: prompt_embeds {list(prompts.shape)} and negative_embeds "
            f"{list(negative.shape)} given; [P, S, T] with P >= 1 and [S, T] are needed"
        )
    return prompts, negative


def _preview(latents: Tensor) -> Tensor:
    """Show latents without a decoder: the mean channel, clipped at two standard deviations."""
    grey = latents.float().mean(dim=1)
    spread = grey.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return ((grey - grey.mean(dim=(1, 2, 3), keepdim=True)) / (4 * spread) + 0.5).clamp(0, 1)
