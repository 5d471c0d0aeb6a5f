"""How fast the fused kernels and their rivals are on a GPU: what is measured, in which order.

Forward is timed without a graph, from roped q, k, v. Backward is timed alone: `torch.autograd.grad`
of a graph that is kept, with the gradients of both maps; the step "backward, maps frozen" is
without them. A module goes from the projected q, k, v, before qk-norm and rotation, to the output
projection's input.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linvideo_core.kernels.reference import linear_attention as define_linear

from .agreement import LENGTHS, check, relative_error
from .baselines import TOLERANCE, Contender
from .floors import (
    BACKWARD,
    FIXED_BANDWIDTH,
    FORWARD,
    FROZEN,
    HEAD_DIM,
    RATIOS,
    Measured,
    Row,
    Shape,
    assemble_rows,
)
from .timing import METHOD, NUM_COPIED, Call, Instruments, measure_copy_bandwidth

logger = logging.getLogger(__name__)

_CHECKED_HEADS = 12

NormRotary = Callable[[Tensor], Tensor]
"""Maps a projection [B, L, N D] to normed, roped heads [B, L, N, D]."""

MakeNormRotary = Callable[[Shape, torch.device, torch.dtype], NormRotary]


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement; ratio is M / D, 0 where features do not matter."""

    shape: Shape
    step: str
    ratio: int
    contender: Contender
    norm_rotary: MakeNormRotary | None = None


class Setting(NamedTuple):
    """Where and on what everything is measured."""

    instruments: Instruments
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Rows of the record, rows over the number of tokens, and what else is worth keeping."""

    rows: list[Row]
    over_tokens: list[Row]
    details: dict[str, Any]


def make_inputs(shape: Shape, ratio: int, setting: Setting) -> list[Tensor]:
    """Return random query, key, value [1, L, N, D] and maps [N, D, M/2], projections near 1."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=setting.dtype, device=setting.device)

    tokens = [normal(1, shape.tokens, shape.heads, HEAD_DIM) for _ in range(3)]
    half = max(ratio, 1) * HEAD_DIM // 2
    return [*tokens, *(normal(shape.heads, HEAD_DIM, half) * HEAD_DIM**-0.5 for _ in range(2))]


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
    if task.norm_rotary:
        return _make_module_call(attend, inputs, task.norm_rotary(task.shape, *setting[1:3]))

    def call() -> Tensor:
        with torch.no_grad():
            return attend(*inputs)

    return call


def _make_module_call(
    attend: Callable[..., Tensor], inputs: list[Tensor], rotate: NormRotary
) -> Call:
    query, key = (x.flatten(2) for x in inputs[:2])

    def call() -> Tensor:
        with torch.no_grad():
            return attend(rotate(query), rotate(key), *inputs[2:]).flatten(2)

    return call


def plan(
    shapes: Sequence[Shape],
    contenders: Sequence[Contender],
    modules: Mapping[str, MakeNormRotary],
) -> list[Task]:
    """List the measurements behind the record's rows, contenders in the order given.

    modules: step -> norm and rotation; the first is eager, and what all are compared with. Softmax
    is measured after each.
    """
    tasks = []
    for shape in shapes:
        for contender in contenders:
            for ratio in RATIOS if contender.has_maps else (0,):
                steps = [FORWARD, BACKWARD] if contender.is_differentiable else [FORWARD]
                # Compiling once more for frozen maps would cost more than it says.
                steps += [FROZEN] if contender.name in ("fused", "eager") else []
                tasks += [Task(shape, step, ratio, contender) for step in steps]
                for i, (step, norm_rotary) in enumerate(modules.items()):
                    is_baseline = i == 0 and contender.name == "eager"
                    if contender.name in ("fused", "sdpa") or is_baseline:
                        tasks.append(Task(shape, step, ratio, contender, norm_rotary))
    return tasks


def measure(task: Task, setting: Setting) -> Measured:
    """Make one measurement; its first call, which may compile, is left out."""
    torch._dynamo.reset()
    call = make_call(task, setting)
    call()
    extra_mb = setting.instruments.extra_mb(call)
    milliseconds = setting.instruments.milliseconds(call)
    return Measured(task.shape, task.step, task.ratio, task.contender.name, milliseconds, extra_mb)


def measure_all(
    tasks: Sequence[Task], setting: Setting, progress: Callable[[str, int, int], None], stage: str
) -> tuple[list[Measured], list[str]]:
    """Return the measurements of all tasks, and a sentence for every rival that failed one.

    What the first task's contender, our own, cannot do is raised.
    """
    measured, left_out = [], []
    for i, task in enumerate(tasks):
        progress(stage, i, len(tasks))
        try:
            measured.append(measure(task, setting))
        except Exception as error:
            # Out of memory, or no kernel for this size: the others can still be measured.
            if task.contender is tasks[0].contender:
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            left_out.append(f"{task.contender.name}, {task.step} at {task.shape}: {reason}")
            logger.warning("left out: %s", left_out[-1])
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    progress(stage, len(tasks), len(tasks))
    return measured, left_out


def check_contenders(
    contenders: Sequence[Contender],
    setting: Setting,
    lengths: Sequence[int] = LENGTHS,
    heads: int = _CHECKED_HEADS,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[list[Contender], list[Row], list[str]]:
    """Return the contenders that agree with their definition, all errors, and who was left out."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    cases = [(tokens, ratio) for tokens in lengths for ratio in RATIOS]
    for i, (tokens, ratio) in enumerate(cases):
        progress("agreement", i, len(cases))
        inputs = make_inputs(Shape(tokens, heads), ratio, setting)
        # Softmax has no features: once is enough.
        mine = [
            c for c in contenders if c.name not in left_out and (c.has_maps or ratio == RATIOS[0])
        ]
        for contender, result in check(mine, inputs, setting.seed):
            if isinstance(result, str):
                left_out[contender.name] = result
                logger.warning("left out: %s", result)
                continue
            features = ratio if contender.has_maps else 0
            rows.append(
                {"contender": contender.name, "ratio": features, "tokens": tokens, **result}
            )
    progress("agreement", len(cases), len(cases))
    agreeing = [c for c in contenders if c.name not in left_out]
    return agreeing, rows, list(left_out.values())


def check_module(
    own: Contender,
    modules: Mapping[str, MakeNormRotary],
    setting: Setting,
    tokens: int = LENGTHS[-1],
    heads: int = _CHECKED_HEADS,
) -> list[Row]:
    """Return the error of each module against eager norm and rotation of fp64 and the definition.

    The rotation itself rounds to fp32, which is exact enough.
    """
    rows = []
    shape = Shape(tokens, heads)
    exact_rotary = next(iter(modules.values()))(shape, setting.device, torch.float64)
    for ratio in RATIOS:
        inputs = make_inputs(shape, ratio, setting)
        wide = [x.double() for x in inputs]
        expected = _make_module_call(define_linear, wide, exact_rotary)()
        for step, norm_rotary in modules.items():
            rotate = norm_rotary(shape, setting.device, setting.dtype)
            error = relative_error(_make_module_call(own.attend, inputs, rotate)(), expected)
            if not error < TOLERANCE:
                raise RuntimeError(
                    f"{step} differs from its definition by {error:.1e}; nothing was timed"
                )
            rows.append({"contender": own.name, "ratio": ratio, "tokens": tokens, step: error})
    return rows


def measure_over_tokens(
    sizes: Sequence[int],
    contenders: Sequence[Contender],
    setting: Setting,
    progress: Callable[[str, int, int], None],
) -> list[Row]:
    """Return rows of `tokens`, `layer`, `milliseconds`, `extra_mb`: ours at M = D, and softmax."""
    layers = {"fused": ("linear", 1), "sdpa": ("softmax", 0)}
    tasks = [
        Task(Shape(tokens, _CHECKED_HEADS), FORWARD, layers[contender.name][1], contender)
        for tokens in sizes
        for contender in contenders
        if contender.name in layers
    ]
    measured, _ = measure_all(tasks, setting, progress, "over tokens")
    return [
        {
            "tokens": item.shape.tokens,
            "layer": layers[item.contender][0],
            "milliseconds": item.milliseconds,
            "extra_mb": item.extra_mb,
        }
        for item in measured
    ]


def measure_speed(
    shapes: Sequence[Shape],
    sizes: Sequence[int],
    contenders: Sequence[Contender],
    modules: Mapping[str, MakeNormRotary],
    setting: Setting,
    progress: Callable[[str, int, int], None],
    *,
    lengths: Sequence[int] = LENGTHS,
    num_copied: int = NUM_COPIED,
) -> Speed:
    """Check agreement at `lengths`, then measure everything.

    num_copied: bf16 elements of the copy that gives the bandwidth.

    Raises RuntimeError where our own kernels are wrong; rivals that are, or that cannot run, are
    left out and named.
    """
    agreeing, agreement, left_out = check_contenders(
        contenders, setting, lengths, progress=progress
    )
    agreement += check_module(agreeing[0], modules, setting, lengths[-1])
    bandwidth = measure_copy_bandwidth(setting.instruments, setting.device, num_copied)
    tasks = plan(shapes, agreeing, modules)
    measured, failed = measure_all(tasks, setting, progress, "shapes")
    over_tokens = measure_over_tokens(sizes, agreeing, setting, progress)
    baseline, itemsize = next(iter(modules)), setting.dtype.itemsize
    rows = assemble_rows(measured, agreement, bandwidth, itemsize, baseline)
    fixed = assemble_rows(measured, agreement, FIXED_BANDWIDTH, itemsize, baseline)
    details = {
        "method": METHOD,
        "copy_terabytes_per_second": bandwidth / 1e12,
        "floor_ratios_at_4.3_terabytes_per_second": [
            {key: row[key] for key in ("shape", "pass", "features", "floor_ratio")} for row in fixed
        ],
        "left_out": [*left_out, *failed],
        "agreement": agreement,
        "measured": [{**item._asdict(), "shape": str(item.shape)} for item in measured],
        "over_tokens": over_tokens,
    }
    return Speed(rows, over_tokens, details)
