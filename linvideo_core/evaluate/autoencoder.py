"""Wan's video autoencoder, by diffusers' `AutoencoderKLWan`: from latents to frames in colour.

Decoding works in fp32, one video at a time, in tiles of 256 x 256 pixels; both models of a
comparison are decoded alike. diffusers is an optional extra.
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint import open_wan
from ..models.shards import StoredTensor, find_tensors
from ..run.errors import SettingError
from ..run.reading import read_json
from ..teacher.teacher import Teacher

logger = logging.getLogger(__name__)

EXTRA = {"diffusers": "diffusers", "imageio_ffmpeg": "imageio-ffmpeg"}
"""The optional packages as they are imported -> as they are installed."""

_FORMS = (
    "give wan_2.1_vae.safetensors or the folder `vae` of a diffusers Wan, whose latents have as "
    "many channels as the model's"
)
_CLASS = "AutoencoderKLWan"
_SINGLE_CHANNELS = 16
# Of both namings: the decoder's last convolution, and the one that latents enter first.
_ENDS = {
    "decoder.head.2.weight": "conv2.weight",
    "decoder.conv_out.weight": "post_quant_conv.weight",
}


def check_packages(field: str) -> None:
    """Raise SettingError where a package of the extra `wan` is missing; field: what needs it."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise SettingError(
            f"{{{field}}} needs {' and '.join(EXTRA[name] for name in missing)}, not installed "
            f"here; pip install {' '.join(EXTRA.values())}, or leave it out",
            field,
        )


def load_autoencoder(path: Path, channels: int) -> nn.Module:
    """Return the autoencoder of a file or folder on the CPU, in fp32, frozen.

    path: a folder of diffusers, a pipeline's folder with `vae` in it, or one safetensors file in
        Wan's own or diffusers' naming.
    channels: of the model's latents.

    Raises FileNotFoundError, ValueError or SettingError, in one sentence, for anything else.
    """
    check_packages("vae")
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if not path.exists():
        raise SettingError(f"{{vae}} {path} given, and no such file exists; {_FORMS}", "vae")
    root = path / "vae" if (path / "vae").is_dir() else path
    stored = find_tensors(root)
    try:
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(_read_config(root, stored))
        config = model.config
        sizes = {config.z_dim, len(config.latents_mean), len(config.latents_std)}
        if sizes != {channels}:
            raise ValueError(
                f"it is for latents of {', '.join(map(str, sizes))} channels, and the model's have "
                f"{channels}"
            )
        state = {name: tensor.read().float() for name, tensor in stored.items()}
        if "conv2.weight" in state:
            state = convert_wan_vae_to_diffusers(state)
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not the model's autoencoder ({reason}); {_FORMS}") from error
    model.enable_tiling()
    return model.eval().requires_grad_(False)


def find_autoencoder(path: Path | None, model: Path | None) -> nn.Module | None:
    """Return the autoencoder at `path`, if any, for a Wan checkpoint; errors as above."""
    if path is None:
        return None
    if model is None:
        raise SettingError(
            "{vae} was given without {model}; the embedded model has a decoder of its own: leave "
            "{vae} out",
            "vae",
            "model",
        )
    return load_autoencoder(path, open_wan(model).config.in_channels)


def with_decoder(teacher: Teacher, autoencoder: nn.Module | None) -> Teacher:
    """Return a teacher whose videos are decoded by an autoencoder, on the teacher's device.

    Without one a Wan's frames are the mean of its latents' channels, which is logged.
    """
    if autoencoder is not None:
        decode = decoder_of(autoencoder, teacher.prompt_embeds.device)
        return dataclasses.replace(teacher, decode=decode)
    if not teacher.is_demo:
        logger.info("without --vae, motion and spectra are of the mean latent channel")
    return teacher


def decoder_of(model: nn.Module, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Move an autoencoder to a device, and return what decodes with it.

    The result maps latents [B, C, F, H, W], as the diffusion model has them, to frames
    [B, F, h, w, 3] in [0, 1] on the device.
    """
    model.to(device)
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1)
        for values in (model.config.latents_mean, model.config.latents_std)
    )

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        frames = [model.decode((x * std + mean)[None]).sample for x in latents.float()]
        return torch.cat(frames).movedim(1, -1).add(1).div(2)

    return decode


def _read_config(root: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return the architecture: a folder's own, or Wan 2.1's at the width of one file."""
    if root.is_dir():
        try:
            config = read_json(root / "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"its config.json cannot be read: {error}") from error
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind != _CLASS:
            raise ValueError(f"its config.json is of {kind!a}, not {_CLASS}")
        if any(n > len(stored) for n in _counts(config)):
            raise ValueError("its config.json tells of more parts than there are tensors")
        return config
    for last, first in _ENDS.items():
        if last in stored and first in stored:
            channels = stored[first].shape[0]
            if channels != _SINGLE_CHANNELS:
                raise ValueError(f"a file of {channels} channels needs its folder of diffusers")
            return {"base_dim": stored[last].shape[1]}
    raise ValueError(f"its tensors are called {', '.join(map(ascii, sorted(stored)[:2]))}")


def _counts(config: Mapping[str, Any]) -> list[int]:
    """Return how many parts of each kind a configuration tells of."""
    blocks = config.get("num_res_blocks")
    lists = [len(value) for value in config.values() if isinstance(value, list)]
    return [*lists, *([blocks] if isinstance(blocks, int) else [])]
