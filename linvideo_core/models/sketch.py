"""A few numbers that tell how far apart two sets of weights are, whatever either is stored in.

A count sketch: every element is added, with a sign, to one of 64 sums; sign and sum follow from the
element's place alone. The distance of two sketches estimates the distance of the weights. On the
embedded model, relative to the weights' norm (sketch, and the true one):

    bf16                  .002  .002    fp8 e4m3              .030  .027
    int8, scaled a row    .006  .006    fp8 e4m3, scaled      .027  .026
    int8, scaled a tensor .011  .011    fp8 e5m2              .050  .053
    6 bits in blocks      .019  .019    LoRA merged, at .03   .027  .030
    4 bits in blocks      .082  .085    LoRA merged, at .3    .26   .29
    3 bits in blocks      .18   .19     random weights       1.51  1.41

In ComfyUI's own forms and GGUF: mxfp8 .030, nvfp4 .083, Q8_0 .004, Q5_0 .033, Q4_0 .067.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

SIZE = 64
_DIGITS = 5
_MAX_ELEMENTS = 2**18


def sketched_rows(shape: Sequence[int]) -> slice:
    """Return which rows of a weight of a shape are looked at: all, or evenly spread ones."""
    return slice(None, None, -(-math.prod(shape) // _MAX_ELEMENTS))


def sketch(weights: Iterable[Tensor]) -> tuple[float, ...]:
    """Return the sketch of some weights' `sketched_rows`, each weight divided by its norm.

    weights: in fp16, bf16 or fp32; always the same ones, in the same order.

    Returns 64 numbers, none where a weight is zero or not finite.
    """
    sums, start, count = np.zeros(SIZE), 0, 0
    for weight in weights:
        values = weight.detach().cpu().float().numpy().ravel()
        norm = float(np.linalg.norm(values.astype(np.float64)))
        if not 0 < norm < math.inf:
            return ()
        places = _scramble(np.arange(start, start + values.size, dtype=np.uint32))
        signed = np.where(places & 1, values, -values)
        sums += np.bincount((places >> 8) % SIZE, weights=signed, minlength=SIZE) / norm
        start, count = start + values.size, count + 1
    return tuple(round(float(value), _DIGITS) for value in sums / math.sqrt(count))


def sketch_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Estimate the relative distance of the weights behind two sketches, to about 9 %."""
    return math.dist(first, second)


def _scramble(places: np.ndarray) -> np.ndarray:
    """Mix the bits of uint32 numbers [n]: multiplications and shifts, the same on any machine."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        places = (places ^ (places >> shift)) * np.uint32(factor)
    return places ^ (places >> 16)
