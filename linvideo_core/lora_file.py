"""Add a LoRA of others to a model's weights, such as one that makes it sample in few steps.

Its file names layers as ComfyUI, diffusers, PEFT or kohya's scripts do; our own artifacts are such
files too, their linear attention left out.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .artifact.additions import add_change
from .models.naming import from_diffusers

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
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA as its file has it.

    layers: name in the file -> `down` [R, in, ...], `up` [out, R, ...], `alpha` []; beside them or
        alone whole changes, `weight` and `bias`.
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
                if key.startswith(_OWN):
                    continue
                suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
                if suffix is None:
                    raise ValueError(
                        f"{path} holds {key!a}, which is not known; known are a LoRA's lora_up and "
                        "lora_down, or lora_B and lora_A, alpha, diff and diff_b"
                    )
                role = layers.setdefault(key.removesuffix(suffix), {})
                role[_ROLES[suffix]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    for name, parts in layers.items():
        if any(parts[side].ndim < 2 for side in ("up", "down") if side in parts):
            raise ValueError(f"{path} has a LoRA of {name!a} that is no matrix: it is damaged")
        if ("up" in parts) != ("down" in parts) or parts.keys() == {"alpha"}:
            raise ValueError(f"{path} has only one half of the LoRA of {name!a}: it is damaged")
    if not layers:
        raise ValueError(f"{path} holds no weight changes, so it is no LoRA")
    return LoraFile(path=path, layers=layers)


@contextlib.contextmanager
def with_lora(model: nn.Module, lora: LoraFile, *, strength: float = 1.0) -> Iterator[nn.Module]:
    """Add `strength alpha / R up down` to the weights of a model for a while.

    A linearized model is changed in the same weights as the model that it was made from. Where a
    layer has no alpha, alpha is R. Leaving it gives the model back bit for bit.

    Raises ValueError, in one sentence and with the model as it was, for names that match no layer
    of the model, for shapes that differ, and for a sum that overflows.
    """
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength {strength} given; a finite number is needed")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # A whole change may also be of a parameter that is called neither weight nor bias.
    names = _match(lora, {*shapes, *(name.rpartition(".")[0] for name in shapes)})
    with contextlib.ExitStack() as undo:
        for stored, parts in lora.layers.items():
            for suffix, factors, scale in _changes(parts):
                name = names[stored]
                name = name if name in shapes and suffix == "weight" else f"{name}.{suffix}"
                _check(lora, stored, factors, shapes.get(name))
                add_change(undo, model, name, factors, strength * scale)
        yield model


def _changes(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor], float]]:
    """Yield what changes, weight or bias: its name, the change's factors and its scale."""
    for whole in ("weight", "bias"):
        if whole in parts:
            yield whole, [parts[whole]], 1.0
    if "up" in parts:
        up, down = (parts[side].flatten(1) for side in ("up", "down"))
        alpha = float(parts["alpha"]) if "alpha" in parts else len(down)
        yield "weight", [up, down], alpha / len(down)


def _match(lora: LoraFile, layers: Collection[str]) -> dict[str, str]:
    """Return the model's name of every layer in the file."""
    underscored = {layer.replace(".", "_"): layer for layer in layers}
    found = {stored: _find(stored, layers, underscored) for stored in lora.layers}
    strangers = sorted(stored for stored, layer in found.items() if layer is None)
    if strangers:
        raise ValueError(
            f"{lora.path} changes {len(strangers)} of {len(found)} layers that the model does not "
            f"have, such as {strangers[0]!a}: choose a LoRA made for this model"
        )
    return found


def _find(stored: str, layers: Collection[str], underscored: Mapping[str, str]) -> str | None:
    if stored.startswith(_UNDERSCORED):
        return underscored.get(stored.removeprefix(_UNDERSCORED).removeprefix("_"))
    name = stored
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return next((n for n in (name, from_diffusers(name)) if n in layers), None)


def _check(lora: LoraFile, stored: str, factors: list[Tensor], expected: tuple | None) -> None:
    """Raise ValueError where a product of factors is not of a parameter's shape."""
    fits = expected is not None and factors[0].shape[0] == expected[0]
    if fits and len(factors) == 2:
        fits = factors[0].shape[1] == len(factors[1])
        fits = fits and factors[1].shape[1] == math.prod(expected[1:])
    elif fits:
        fits = factors[0].shape == expected
    if not fits:
        given = " and ".join(str(list(factor.shape)) for factor in factors)
        needed = "no such weight" if expected is None else f"one of {list(expected)}"
        raise ValueError(
            f"{lora.path} changes {stored!a} by {given}, but the model has {needed}: choose a LoRA "
            "made for this model"
        )
