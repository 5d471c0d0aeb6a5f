"""How fast the fused kernels and their rivals are.

Forward is timed without a graph, from roped q, k, v. Backward is timed alone: `torch.autograd.grad`
of a graph that is kept, with the gradients of both maps; the pass "backward, maps frozen" is
without them.

The byte floor is what must be moved at least, over the bandwidth that a plain copy reaches: forward
and module read q, k, v and write o; backward reads q, k, v, do and writes dq, dk, dv.
"""

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .agreement import HEADS, INPUTS, LENGTHS, check_contenders, check_modules, first_line
from .contenders import (
    HEAD_DIM,
    KITCHEN,
    MODULES,
    RATIOS,
    Contender,
    Setting,
    Shape,
    make_inputs,
    make_module,
)
from .timing import METHOD, Call, extra_mb, milliseconds

logger = logging.getLogger(__name__)

FORWARD, BACKWARD, FROZEN = "forward", "backward", "backward, maps frozen"
NUM_COPIED = 2**30
SHAPES = (Shape(32760, 12), Shape(32760, 40), Shape(75600, 40))
"""Wan 1.3B at 480p, 14B at 480p, 14B at 720p."""

_BASELINE = next(iter(MODULES))
_MOVED_TENSORS = {FORWARD: 4, BACKWARD: 7, FROZEN: 7}
_ERRORS = {BACKWARD: INPUTS, FROZEN: INPUTS[:3]}
_RIVALS = ("compile", "compile_half", "eager", "fla", "sdpa", "fa2", "cudnn", "sage")

Row = dict[str, Any]


class Task(NamedTuple):
    """One measurement: a pass, or a module by its name; ratio is M / D, 0 for softmax."""

    shape: Shape
    step: str
    ratio: int
    contender: Contender


class Measured(NamedTuple):
    """What a task gave."""

    shape: Shape
    step: str
    ratio: int
    contender: str
    milliseconds: float
    extra_mb: float


def make_call(task: Task, setting: Setting) -> Call:
    """Return what is timed: a function without arguments that returns what it computed."""
    inputs = make_inputs(task.shape, task.ratio, setting)
    attend = task.contender.attend
    if task.step in (BACKWARD, FROZEN):
        num_wanted = 5 if task.contender.has_maps and task.step == BACKWARD else 3
        wanted = [x.requires_grad_(True) for x in inputs[:num_wanted]]
        output = attend(*inputs)
        upstream = torch.randn(output.shape, dtype=output.dtype, device=output.device)
        return lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    if task.step == FORWARD:
        return torch.no_grad()(lambda: attend(*inputs))
    return make_module(task.step, task.contender, inputs, setting)


def plan(
    shapes: Sequence[Shape], contenders: Sequence[Contender], modules: Sequence[str]
) -> list[Task]:
    """List the measurements behind the record's rows, contenders in the order given.

    Softmax is measured after each module, other rivals after the eager one.
    """
    tasks = []
    for shape in shapes:
        for contender in contenders:
            steps = [FORWARD, BACKWARD] if contender.is_differentiable else [FORWARD]
            # Compiling once more for frozen maps would cost more than it says.
            steps += [FROZEN] if contender.name in ("fused", "eager") else []
            steps += modules if contender.name in ("fused", "sdpa") else []
            steps += [_BASELINE] if contender.name == "eager" else []
            ratios = RATIOS if contender.has_maps else (0,)
            tasks += [Task(shape, step, ratio, contender) for ratio in ratios for step in steps]
    return tasks


def measure(task: Task, setting: Setting) -> Measured:
    """Make one measurement; its first call, which may compile, is left out."""
    torch._dynamo.reset()
    call = make_call(task, setting)
    call()
    memory = extra_mb(call, setting.device)
    time = milliseconds(call, setting.device, setting.seconds)
    return Measured(task.shape, task.step, task.ratio, task.contender.name, time, memory)


def measure_all(tasks: Sequence[Task], setting: Setting) -> tuple[list[Measured], list[str]]:
    """Return the measurements of all tasks, and a sentence for every rival that failed one.

    What the first task's contender, our own, cannot do is raised.
    """
    measured, left_out = [], []
    for task in tqdm(tasks, "measuring"):
        try:
            measured.append(measure(task, setting))
        except Exception as error:
            # Out of memory, or no kernel for this size: the others can still be measured.
            if task.contender is tasks[0].contender:
                raise
            name = task.contender.name
            left_out.append(f"{name}, {task.step} at {task.shape}: {first_line(error)}")
            logger.warning("left out: %s", left_out[-1])
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return measured, left_out


def measure_over_tokens(
    sizes: Sequence[int],
    contenders: Sequence[Contender],
    setting: Setting,
    heads: int = HEADS,
) -> list[Row]:
    """Return rows of `tokens`, `layer`, `milliseconds`, `extra_mb`: ours at M = D, and softmax."""
    layers = {"fused": ("linear", 1), "sdpa": ("softmax", 0)}
    tasks = [
        Task(Shape(tokens, heads), FORWARD, layers[contender.name][1], contender)
        for tokens in sizes
        for contender in contenders
        if contender.name in layers
    ]
    measured, _ = measure_all(tasks, setting)
    return [
        {
            "tokens": item.shape.tokens,
            "layer": layers[item.contender][0],
            "milliseconds": item.milliseconds,
            "extra_mb": item.extra_mb,
        }
        for item in measured
    ]


def fit_slope(rows: Sequence[Row], layer: str, key: str) -> float:
    """Return the slope of log(key) over log(tokens) in the upper half of a layer's sizes.

    Small sizes are left out because fixed costs flatten them. NaN where too little was measured.
    """
    points = sorted((row["tokens"], row[key]) for row in rows if row["layer"] == layer)
    points = [point for point in points[min(len(points) // 2, len(points) - 2) :] if point[1] > 0]
    if len(points) < 2:
        return math.nan
    tokens, values = zip(*points, strict=True)
    return statistics.linear_regression(
        list(map(math.log, tokens)), list(map(math.log, values))
    ).slope


def measure_speed(
    shapes: Sequence[Shape],
    sizes: Sequence[int],
    contenders: Sequence[Contender],
    modules: Sequence[str],
    setting: Setting,
    *,
    lengths: Sequence[int] = LENGTHS,
    num_copied: int = NUM_COPIED,
) -> tuple[list[Row], dict[str, Any]]:
    """Check agreement at `lengths`, then measure everything; return the record's rows and details.

    sizes: numbers of tokens of `measure_over_tokens`.
    num_copied: bf16 elements of the copy that gives the bandwidth.

    Raises RuntimeError where our own kernels are wrong; rivals that are, or that cannot run, are
    left out and named.
    """
    agreeing, agreement, left_out = check_contenders(contenders, setting, lengths)
    agreement += check_modules(agreeing[0], modules, setting, lengths[-1])
    bandwidth = measure_copy_bandwidth(setting, num_copied)
    measured, failed = measure_all(plan(shapes, agreeing, modules), setting)
    rows = assemble_rows(measured, agreement, bandwidth, setting.dtype.itemsize)
    return rows, {
        "method": METHOD,
        "copy_terabytes_per_second": bandwidth / 1e12,
        "left_out": [*left_out, *failed],
        "agreement": agreement,
        "measured": [{**item._asdict(), "shape": str(item.shape)} for item in measured],
        "over_tokens": measure_over_tokens(sizes, agreeing, setting),
    }


def measure_copy_bandwidth(setting: Setting, num_copied: int = NUM_COPIED) -> float:
    """Return the bytes per second, read and written, of a plain copy of bf16 on the device."""
    source = torch.randn(num_copied, dtype=torch.bfloat16, device=setting.device)
    target = torch.empty_like(source)
    time = milliseconds(lambda: target.copy_(source), setting.device, setting.seconds)
    return 2 * source.nbytes / (time / 1000)


def floor_milliseconds(shape: Shape, step: str, itemsize: int, bandwidth: float) -> float:
    """Return the time that moving the bytes of a pass takes at `bandwidth` bytes per second."""
    tensor = shape.tokens * shape.heads * HEAD_DIM * itemsize
    return 1000 * _MOVED_TENSORS.get(step, 4) * tensor / bandwidth


def find_error(agreement: Sequence[Row], contender: str, ratio: int, step: str) -> float | None:
    """Return the largest error of a contender's pass: its value, or any of its gradients."""
    names = _ERRORS.get(step, (step,))
    mine = [row for row in agreement if (row["contender"], row["ratio"]) == (contender, ratio)]
    return max((row[name] for row in mine for name in names if name in row), default=None)


def assemble_rows(
    measured: Sequence[Measured], agreement: Sequence[Row], bandwidth: float, itemsize: int
) -> list[Row]:
    """Turn measurements into the record's rows: one for each pass of the fused kernels.

    vs_x is x's time over ours; vs_kitchen is that of softmax after ComfyUI's norm and rotation.
    bandwidth: bytes per second.
    """
    times = {item[:4]: item.milliseconds for item in measured}
    rows = []
    for shape, step, ratio, name, time, memory in measured:
        if name != "fused":
            continue
        is_module = step not in _MOVED_TENSORS
        theirs = _BASELINE if is_module else step
        # Softmax has no maps: its backward pass is one and the same.
        plain = BACKWARD if step == FROZEN else theirs
        others = {
            rival: times.get((shape, theirs, ratio, rival), times.get((shape, plain, 0, rival)))
            for rival in _RIVALS
        }
        others["kitchen"] = times.get((shape, KITCHEN, 0, "sdpa")) if is_module else None
        rows.append(
            {
                "shape": str(shape),
                "pass": step,
                "features": "D" if ratio == 1 else f"{ratio}D",
                "milliseconds": time,
                "floor_ratio": time / floor_milliseconds(shape, step, itemsize, bandwidth),
                **{f"vs_{rival}": other and other / time for rival, other in others.items()},
                "extra_mb": memory,
                "relative_error": find_error(agreement, name, ratio, step),
                "eager_error": find_error(agreement, "eager", ratio, step),
            }
        )
    shapes, passes = ([row[key] for row in rows] for key in ("shape", "pass"))
    return sorted(rows, key=lambda row: (shapes.index(row["shape"]), passes.index(row["pass"])))
