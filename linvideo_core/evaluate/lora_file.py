"""Add a LoRA of others to a model's weights, such as one that makes it sample in few steps."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..artifact.apply import add_change
from ..artifact.header import DTYPES
from ..models.checkpoint import from_diffusers
from ..run.errors import shown_value

logger = logging.getLogger(__name__)

_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.")
# How a tensor's name ends in files of ComfyUI, diffusers, PEFT and kohya's scripts -> what it is.
_ROLES = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",
}


WeightChange = tuple[str, list[Tensor], float]
"""A parameter's name, and what is added to it: matrices and the scale of their product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA as its file has it.

    layers: name in the file -> `down` [R, in, ...], `up` [out, R, ...], `alpha` of one element;
        beside them or alone whole changes, `weight`, `bias` and `modulation`.
    """

    path: Path
    layers: Mapping[str, Mapping[str, Tensor]]


def load_lora(path: Path) -> LoraFile:
    """Read a LoRA file onto the CPU; our own artifacts are such files, linear attention left out.

    Raises FileNotFoundError or ValueError for what is no LoRA or holds tensors that are none of a
    LoRA's, such as DoRA's scales.
    """
    if not path.is_file():
        raise FileNotFoundError(f"LoRA {path} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown_value(error)})"
        ) from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(key for key in tensors if not key.startswith("linvideo.")):
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(
                f"{path} holds {shown_value(key, is_quoted=True)}, which is not known; known are a "
                "LoRA's lora_up and lora_down, or lora_B and lora_A, alpha, diff, diff_b and diff_m"
            )
        layers.setdefault(key.removesuffix(suffix), {})[_ROLES[suffix]] = tensors[key]
    for name, parts in layers.items():
        _check_factors(path, name, parts)
    if not layers:
        raise ValueError(f"{path} holds no weight changes, so it is no LoRA")
    if count := sum("modulation" in parts for parts in layers.values()):
        logger.warning(
            "%s changes the modulation of %d layers (diff_m), which ComfyUI leaves out", path, count
        )
    return LoraFile(path=path, layers=layers)


def _check_factors(path: Path, name: str, parts: Mapping[str, Tensor]) -> None:
    pair = [parts[role] for role in ("up", "down") if role in parts]
    is_damaged = len(pair) == 1 or any(x.ndim < 2 or not x.numel() for x in pair)
    # PyTorch computes with 64 sizes at most.
    is_damaged = is_damaged or any(
        x.ndim > 64 or x.dtype not in DTYPES or not x.isfinite().all() for x in parts.values()
    )
    if is_damaged or ("alpha" in parts and (not pair or parts["alpha"].numel() != 1)):
        found = " and ".join(f"{role} {x.dtype} {list(x.shape)}" for role, x in parts.items())
        raise ValueError(
            f"{path} holds {found[:200]} for {shown_value(name, is_quoted=True)}, where two "
            "matrices of rank 1 or more and at most a single number alpha are needed, all finite "
            "fp16, bf16 or fp32: it is damaged"
        )


def find_changes(lora: LoraFile, model: nn.Module, *, strength: float = 1.0) -> list[WeightChange]:
    """Return what a LoRA adds to a model's weights: `strength alpha / R up down`.

    Where a layer has no alpha, alpha is R. Layers that the model lacks, such as a text-to-video
    one's image layers, are left out as ComfyUI does it; one warning counts and names them.

    Raises ValueError where no layer is left, for shapes that differ, and for a strength that is not
    finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength {strength} given; a finite number is needed")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    changes, missing = [], set()
    for stored, parts in lora.layers.items():
        for role, factors, scale in _split_layer(parts):
            name = _find_parameter(shapes, stored, role)
            if name is None:
                missing.add(stored)
            elif _fits(factors, shapes[name]):
                changes.append((name, factors, strength * scale))
            else:
                given = " and ".join(str(list(factor.shape)) for factor in factors)
                raise ValueError(
                    f"{lora.path} changes {stored!a} by {given}, but the model has one of "
                    f"{list(shapes[name])}: choose a LoRA made for this model"
                )
    if missing:
        lacks = (
            f"{lora.path} changes {len(missing)} of {len(lora.layers)} layers that the model "
            f"does not have, such as {min(missing)!a}"
        )
        if not changes:
            raise ValueError(f"{lacks}: choose a LoRA made for this model")
        logger.warning("%s; they are left out", lacks)
    return changes


@contextlib.contextmanager
def add_changes(model: nn.Module, changes: Iterable[WeightChange]) -> Iterator[nn.Module]:
    """Change a model's weights while the context lasts; then it is as before, bit for bit.

    Raises ArtifactError, with the model as it was, for a sum that overflows.
    """
    with contextlib.ExitStack() as undo:
        for change in changes:
            add_change(undo, model, *change)
        yield model


def _split_layer(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor], float]]:
    """Yield what changes, such as the weight: its name, the change's factors and its scale."""
    for whole in ("weight", "bias", "modulation"):
        if whole in parts:
            yield whole, [parts[whole]], 1.0
    if "up" in parts:
        up, down = (parts[side].flatten(1) for side in ("up", "down"))
        alpha = float(parts["alpha"]) if "alpha" in parts else len(down)
        yield "weight", [up, down], alpha / len(down)


def _find_parameter(names: Collection[str], stored: str, role: str) -> str | None:
    """Return the parameter of a model that a tensor in a file changes, None where there is none."""
    layer = stored
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    if stored.startswith("lora_unet_"):
        # kohya's scripts write underscores for the dots.
        wanted = stored.removeprefix("lora_unet_").removeprefix("_")
        layers = (name.rpartition(".")[0] for name in names)
        layer = next((name for name in layers if name.replace(".", "_") == wanted), wanted)
    leaf = role if role in ("bias", "modulation") else "weight"
    # A whole change may also be of a parameter that is called neither weight nor bias.
    for name in (layer, from_diffusers(layer)):
        for parameter in (name, f"{name}.{leaf}") if leaf == "weight" else (f"{name}.{leaf}",):
            if parameter in names:
                return parameter
    return None


def _fits(factors: list[Tensor], shape: tuple[int, ...]) -> bool:
    if len(factors) == 1:
        return factors[0].shape == shape
    up, down = factors
    return up.shape == (shape[0], len(down)) and down.shape[1] == math.prod(shape[1:])
