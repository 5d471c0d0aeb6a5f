"""Whether a model's weights are those that a file was made from, in words."""

import dataclasses
from typing import Literal

from ..models.sketch import sketch_distance
from .header import ArtifactHeader

_SAME, _CLOSE = 0.005, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """What tells a model's own weights from others, as far as they could be read.

    digest, sketch: of `attention_sites.weights_digest` and `weights_sketch`; empty where unread.
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
        if self.distance is None:
            return f"the model's weights are not those that the file was made from: {reason}"
        off = f"about {100 * self.distance:.2g} % off those that the file was made from"
        return f"the model's weights are {off}: {reason}"


def compare_weights(header: ArtifactHeader, found: BaseWeights) -> WeightsMatch:
    """Compare what a file says of the weights it was made from with a model's.

    Sketches decide where both have one (see `models.sketch` for what roundings measure).
    """
    if header.weights_digest == found.digest:
        return WeightsMatch("same", 0.0)
    if not (header.weights_sketch and found.sketch):
        # Of quantised weights the digest is never that of the weights they were made from.
        is_plain = found.digest and found.bits >= 16
        return WeightsMatch("other" if is_plain else "unknown")
    distance = sketch_distance(header.weights_sketch, found.sketch)
    if distance < _SAME:
        return WeightsMatch("same", distance)
    # Weights of few bits are rounded by more: 1.5 to 2 times 2^-bits of their norm was measured.
    is_close = distance < max(_CLOSE, 3 * 2**-found.bits)
    return WeightsMatch("close" if is_close else "other", distance)
