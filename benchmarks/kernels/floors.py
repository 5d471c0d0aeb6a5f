"""What measured times mean: multiples of the byte floor and of others' times, as rows of a record.

The byte floor is what must be moved at least, over the bandwidth that a plain copy reaches: forward
reads q, k, v and writes o; backward reads q, k, v, do and writes dq, dk, dv. A module goes from the
projected q, k, v to the output projection's input, so its floor is forward's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .agreement import INPUTS

HEAD_DIM = 128
RATIOS = (1, 2)
FORWARD, BACKWARD, FROZEN = "forward", "backward", "backward, maps frozen"
KITCHEN = "module, comfy-kitchen RoPE"
# Earlier figures were given against this bandwidth.
FIXED_BANDWIDTH = 4.3e12

_MOVED_TENSORS = {FORWARD: 4, BACKWARD: 7, FROZEN: 7}
_ERRORS = {BACKWARD: INPUTS, FROZEN: INPUTS[:3]}
_RIVALS = ("compile", "compile_half", "eager", "fla", "sdpa", "fa2", "cudnn", "sage")

Row = dict[str, Any]


class Shape(NamedTuple):
    """Tokens and heads of a video model's self-attention."""

    tokens: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.heads}"


SHAPES = (Shape(32760, 12), Shape(32760, 40), Shape(75600, 40))
"""Wan 1.3B at 480p, 14B at 480p, 14B at 720p."""


class Measured(NamedTuple):
    """What a task gave."""

    shape: Shape
    step: str
    ratio: int
    contender: str
    milliseconds: float
    extra_mb: float


def floor_milliseconds(shape: Shape, step: str, itemsize: int, bandwidth: float) -> float:
    """Return the time that moving the bytes of a step takes at `bandwidth` bytes per second."""
    tensor = shape.tokens * shape.heads * HEAD_DIM * itemsize
    return 1000 * _MOVED_TENSORS.get(step, 4) * tensor / bandwidth


def find_error(agreement: Sequence[Row], contender: str, ratio: int, step: str) -> float | None:
    """Return the largest error of a contender's step: its value, or any of its gradients."""
    names = _ERRORS.get(step, (step,))
    errors = [
        row[name]
        for row in agreement
        if row["contender"] == contender and row["ratio"] == ratio
        for name in names
        if name in row
    ]
    return max(errors, default=None)


def assemble_rows(
    measured: Sequence[Measured],
    agreement: Sequence[Row],
    bandwidth: float,
    itemsize: int,
    baseline: str,
) -> list[Row]:
    """Turn measurements into the record's rows: one for each step of the fused kernels.

    vs_x is x's time over ours; vs_kitchen is that of softmax after ComfyUI's norm and rotation.
    bandwidth: bytes per second. baseline: the module step whose times the others' modules have.
    """
    times = {item[:4]: item.milliseconds for item in measured}
    rows = []
    for shape, step, ratio, name, milliseconds, extra_mb in measured:
        if name != "fused":
            continue
        theirs = step if step in _MOVED_TENSORS else baseline
        # Softmax has no maps: its backward pass is one and the same.
        plain = BACKWARD if step == FROZEN else theirs
        others = {
            rival: times.get((shape, theirs, ratio, rival), times.get((shape, plain, 0, rival)))
            for rival in _RIVALS
        }
        is_module = theirs == baseline
        others["kitchen"] = times.get((shape, KITCHEN, 0, "sdpa")) if is_module else None
        floor = floor_milliseconds(shape, step, itemsize, bandwidth)
        rows.append(
            {
                "shape": str(shape),
                "pass": step,
                "features": "D" if ratio == 1 else f"{ratio}D",
                "milliseconds": milliseconds,
                "floor_ratio": milliseconds / floor,
                **{f"vs_{rival}": time and time / milliseconds for rival, time in others.items()},
                "extra_mb": extra_mb,
                "relative_error": find_error(agreement, name, ratio, step),
                "eager_error": find_error(agreement, "eager", ratio, step),
            }
        )
    shapes, passes = ([row[key] for row in rows] for key in ("shape", "pass"))
    return sorted(rows, key=lambda row: (shapes.index(row["shape"]), passes.index(row["pass"])))
