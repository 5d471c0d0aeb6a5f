"""Add a LoRA of others to a model's weights, such as one that makes it sample in few steps.

Its file names layers as ComfyUI, diffusers, PEFT or kohya's scripts do; our own artifacts are such
files too, their linear attention left out.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..artifact.apply import add_change
from ..models.checkpoint import from_diffusers

logger = logging.getLogger(__name__)

_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.")
_UNDERSCORED = "lora_unet_"
_OWN = "linvideo."
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
_WHOLE = ("weight", "bias", "modulation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA as its file has it.

    layers: name in the file -> `down` [R, in, ...], `up` [out, R, ...], `alpha` of one element;
        beside them or alone whole changes, `weight`, `bias` and `modulation`.
    """

    path: Path
    layers: Mapping[str, Mapping[str, Tensor]]


def load_lora(path: Path) -> LoraFile:
    """Read a LoRA file onto the CPU.

    Raises FileNotFoundError or ValueError, in one sentence, for what is no LoRA or holds tensors
    that are none of a LoRA's, such as DoRA's scales.
    """
    if not path.is_file():
        raise FileNotFoundError(f"LoRA {path} does not exist")
    layers: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():
                if not key.startswith(_OWN):
                    name, role = _split(path, key)
                    layers.setdefault(name, {})[role] = file.get_tensor(key)
                    _check_tensor(path, key, role, layers[name][role])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    for name, parts in layers.items():
        if ("up" in parts) != ("down" in parts) or parts.keys() == {"alpha"}:
            raise ValueError(f"{path} has only one half of the LoRA of {name!a}: it is damaged")
    if not layers:
        raise ValueError(f"{path} holds no weight changes, so it is no LoRA")
    if count := sum("modulation" in parts for parts in layers.values()):
        logger.warning(
            "%s changes the modulation of %d layers (diff_m), which ComfyUI leaves out", path, count
        )
    return LoraFile(path=path, layers=layers)


def _split(path: Path, key: str) -> tuple[str, str]:
    """Return the layer of a tensor in a file, and what it is of the layer's change."""
    suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(
            f"{path} holds {key!a}, which is not known; known are a LoRA's lora_up and lora_down, "
            "or lora_B and lora_A, alpha, diff, diff_b and diff_m"
        )
    return key.removesuffix(suffix), _ROLES[suffix]


def _check_tensor(path: Path, key: str, role: str, tensor: Tensor) -> None:
    """Raise ValueError, in one sentence, for a tensor that no change can be made of."""
    needed = None
    if role == "alpha" and tensor.numel() != 1:
        needed = "a single number"
    elif role in ("up", "down") and (tensor.ndim < 2 or not tensor.numel()):
        needed = "a matrix of rank 1 or more"
    if needed is not None:
        raise ValueError(
            f"{path} holds {key!a} of shape {list(tensor.shape)}, where {needed} is needed: it is "
            "damaged"
        )


def fit_lora(lora: LoraFile, model: nn.Module) -> LoraFile:
    """Return a LoRA without what the model lacks, such as a text-to-video one's image layers.

    Where something is left out, as ComfyUI does it, one warning counts and names it.

    Raises ValueError, in one sentence, where nothing is left.
    """
    targets = _Targets(model)
    fitting: dict[str, dict[str, Tensor]] = {}
    strangers = set()
    for stored, parts in lora.layers.items():
        for role, tensor in parts.items():
            if targets.find(stored, role) is None:
                strangers.add(stored)
            else:
                fitting.setdefault(stored, {})[role] = tensor
    if strangers:
        lacks = (
            f"{lora.path} changes {len(strangers)} of {len(lora.layers)} layers that the model "
            f"does not have, such as {min(strangers)!a}"
        )
        if not fitting:
            raise ValueError(f"{lacks}: choose a LoRA made for this model")
        logger.warning("%s; they are left out", lacks)
    return dataclasses.replace(lora, layers=fitting)


@contextlib.contextmanager
def with_lora(model: nn.Module, lora: LoraFile, *, strength: float = 1.0) -> Iterator[nn.Module]:
    """Add `strength alpha / R up down` to the weights of a model for a while.

    A linearized model is changed in the same weights as the model that it was made from. Where a
    layer has no alpha, alpha is R; layers that the model lacks are left out, see `fit_lora`.
    Leaving it gives the model back bit for bit.

    Raises ValueError, in one sentence and with the model as it was, for names that match no layer
    of the model, for shapes that differ, and for a sum that overflows.
    """
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength {strength} given; a finite number is needed")
    targets = _Targets(model)
    with contextlib.ExitStack() as undo:
        for stored, parts in fit_lora(lora, model).layers.items():
            for role, factors, scale in _changes(parts):
                name = targets.find(stored, role)
                _check(lora, stored, factors, targets.shapes[name])
                add_change(undo, model, name, factors, strength * scale)
        yield model


def _changes(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor], float]]:
    """Yield what changes, such as the weight: its name, the change's factors and its scale."""
    for whole in _WHOLE:
        if whole in parts:
            yield whole, [parts[whole]], 1.0
    if "up" in parts:
        up, down = (parts[side].flatten(1) for side in ("up", "down"))
        alpha = float(parts["alpha"]) if "alpha" in parts else len(down)
        yield "weight", [up, down], alpha / len(down)


class _Targets:
    """A model's parameters by the names that LoRA files have for their layers."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        # A whole change may also be of a parameter that is called neither weight nor bias.
        self._layers = {*self.shapes, *(name.rpartition(".")[0] for name in self.shapes)}
        self._underscored = {layer.replace(".", "_"): layer for layer in self._layers}

    def find(self, stored: str, role: str) -> str | None:
        """Return the parameter that a tensor in a file changes, None where there is none."""
        layer = self._find_layer(stored)
        leaf = role if role in _WHOLE else "weight"
        names = ([layer] if leaf == "weight" else []) + [f"{layer}.{leaf}"]
        return next((name for name in names if name in self.shapes), None)

    def _find_layer(self, stored: str) -> str | None:
        if stored.startswith(_UNDERSCORED):
            return self._underscored.get(stored.removeprefix(_UNDERSCORED).removeprefix("_"))
        name = stored
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        return next((n for n in (name, from_diffusers(name)) if n in self._layers), None)


def _check(lora: LoraFile, stored: str, factors: list[Tensor], expected: tuple[int, ...]) -> None:
    """Raise ValueError where a product of factors is not of a parameter's shape."""
    if len(factors) == 2:
        up, down = factors
        fits = up.shape == (expected[0], len(down)) and down.shape[1] == math.prod(expected[1:])
    else:
        fits = factors[0].shape == expected
    if not fits:
        given = " and ".join(str(list(factor.shape)) for factor in factors)
        raise ValueError(
            f"{lora.path} changes {stored!a} by {given}, but the model has one of "
            f"{list(expected)}: choose a LoRA made for this model"
        )
