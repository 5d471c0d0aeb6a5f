"""What tells one set of weights from another of the same architecture: a digest and a sketch.

The digest knows the very same weights again. The sketch measures how far others are, whatever
either is stored in. It is a count sketch: every element is added, with a sign, to one of 64 sums;
sign and sum follow from the element's place alone. The distance of two sketches estimates the
distance of the weights. On the embedded model, relative to the weights' norm (sketch, true):

    bf16                  .002  .002    fp8 e4m3              .030  .027
    int8, scaled a row    .006  .006    fp8 e4m3, scaled      .027  .026
    int8, scaled a tensor .011  .011    fp8 e5m2              .050  .053
    6 bits in blocks      .019  .019    LoRA merged, at .03   .027  .030
    4 bits in blocks      .082  .085    LoRA merged, at .3    .26   .29
    3 bits in blocks      .18   .19     random weights       1.51  1.41

In ComfyUI's own forms and GGUF: mxfp8 .030, nvfp4 .083, Q8_0 .004, Q5_0 .033, Q4_0 .067.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from torch import Tensor, nn

from .attention_sites import AttentionSite, ModelFamily
from .lora import LowRank

SKETCH_SIZE = 64
_DIGITS = 5
_MAX_ELEMENTS = 2**18
# Distances below which weights count as the same, and as close.
_SAME, _CLOSE = 0.005, 0.1
_ATTRIBUTE = "linvideo_base_weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """What tells a model's own weights from others, as far as they could be read.

    digest, sketch: of `weights_digest` and `weights_sketch`; empty where unread.
    bits: that a weight takes in the model.
    """

    digest: str = ""
    sketch: tuple[float, ...] = ()
    bits: float = 16.0


@dataclasses.dataclass(frozen=True)
class WeightsMatch:
    """How a model's weights lie to those that a file was made from.

    distance: relative to their norm, about; None where it was not measured.
    """

    kind: Literal["same", "close", "other", "unknown"]
    distance: float | None = None

    def __str__(self) -> str:
        if self.kind == "same":
            return "the model has the weights that the file was made from"
        if self.kind == "unknown":
            return "the model's weights cannot be compared with those that the file was made from"
        reason = "another finetune, or the other one of two experts"
        if self.kind == "close":
            reason = "the same model in another precision, or a slight finetune of it"
        off = "not" if self.distance is None else f"about {100 * self.distance:.2g} % off"
        return f"the model's weights are {off} those that the file was made from: {reason}"


def compare_weights(made_from: BaseWeights, found: BaseWeights) -> WeightsMatch:
    """Compare a model's weights with those that a file was made from.

    Sketches decide where both have one; see the module for what roundings measure.
    """
    if made_from.digest == found.digest:
        return WeightsMatch("same", 0.0)
    if not (made_from.sketch and found.sketch):
        # Of quantised weights the digest is never that of the weights they were made from.
        is_plain = found.digest and found.bits >= 16
        return WeightsMatch("other" if is_plain else "unknown")
    # An estimate of the weights' own relative distance, to about 9 %.
    distance = math.dist(made_from.sketch, found.sketch)
    if distance < _SAME:
        return WeightsMatch("same", distance)
    # Weights of few bits are rounded by more: 1.5 to 2 times 2^-bits of their norm was measured.
    is_close = distance < max(_CLOSE, 3 * 2**-found.bits)
    return WeightsMatch("close" if is_close else "other", distance)


def keep_base_weights(model: nn.Module, base: BaseWeights) -> None:
    """Let a model whose weights are rounded go by those of the checkpoint it was rounded from."""
    setattr(model, _ATTRIBUTE, base)


def base_weights_of(
    model: nn.Module, family: ModelFamily, sites: list[AttentionSite]
) -> BaseWeights:
    """Return what tells a model's weights, or those that `keep_base_weights` gave it."""
    if _ATTRIBUTE in vars(model):
        return vars(model)[_ATTRIBUTE]
    weights = map(model.get_parameter, sketched_weights(family, sites))
    sketched = sketch(weight[sketched_rows(weight.shape)] for weight in weights)
    return BaseWeights(digest=weights_digest(model, sites), sketch=sketched)


def weights_digest(model: nn.Module, sites: list[AttentionSite]) -> str:
    """Return 16 hex digits that tell a model's weights, see `base_weights_of`."""
    if _ATTRIBUTE in vars(model):
        return vars(model)[_ATTRIBUTE].digest
    return digest_weights(map(model.get_parameter, digested_weights(model, sites)))


def digested_weights(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """Return the names of the weights that the digest is made of, in order.

    Those of the first and the last site; a layer's bias last, whichever its class registers first.
    """
    names = []
    for site in (sites[0], sites[-1]):
        module = model.get_submodule(site.name)
        for prefix, layer in module.named_modules(prefix=site.name):
            if f"{prefix}.".startswith(f"{site.name}.attention.") or isinstance(layer, LowRank):
                continue  # A student's own.
            own = [f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)]
            names += sorted(own, key=lambda name: name.endswith(".bias"))
    return names


def digest_weights(weights: Iterable[Tensor]) -> str:
    """Return 16 hex digits of weights in the order of `digested_weights`."""
    digest = hashlib.blake2b(digest_size=8)
    for weight in weights:
        digest.update(weight.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sketched_weights(family: ModelFamily, sites: list[AttentionSite]) -> list[str]:
    """Return the names of the weights that the sketch is made of, in order."""
    ends = (sites[0], sites[-1])
    return [f"{site.name}.{layer}.weight" for site in ends for layer in family.sketched]


def sketched_rows(shape: Sequence[int]) -> slice:
    """Return which rows of a weight of a shape are sketched: all, or evenly spread ones."""
    return slice(None, None, -(-math.prod(shape) // _MAX_ELEMENTS))


def sketch(weights: Iterable[Tensor]) -> tuple[float, ...]:
    """Return the sketch of some weights' `sketched_rows`, each weight divided by its norm.

    weights: in fp16, bf16 or fp32; always the same ones, in the same order.

    Returns 64 numbers, none where a weight is zero or not finite.
    """
    sums, start, count = np.zeros(SKETCH_SIZE), 0, 0
    for weight in weights:
        values = weight.detach().cpu().float().numpy().ravel()
        norm = float(np.linalg.norm(values.astype(np.float64)))
        if not 0 < norm < math.inf:
            return ()
        places = _scramble(np.arange(start, start + values.size, dtype=np.uint32))
        signed = np.where(places & 1, values, -values)
        sums += np.bincount((places >> 8) % SKETCH_SIZE, signed, SKETCH_SIZE) / norm
        start, count = start + values.size, count + 1
    return tuple(round(float(value), _DIGITS) for value in sums / math.sqrt(count))


def _scramble(places: np.ndarray) -> np.ndarray:
    """Mix the bits of uint32 numbers [n]: multiplications and shifts, the same on any machine."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        places = (places ^ (places >> shift)) * np.uint32(factor)
    return places ^ (places >> 16)
