"""How many layers must be linear for a speed-up: what layers cost is measured beforehand.

One call of the model is timed with every layer softmax and once more with every layer linear, at
the size of the videos and by the softmax kernel that the run was given.
"""

import contextlib
import dataclasses
import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.softmax import DENSITY, SPARSE
from ..models.attention import SoftmaxAttention
from ..models.config import SoftmaxConfig
from ..models.experts import HIGH, Experts
from ..run.config import override
from ..run.context import Run
from ..run.errors import SettingError
from ..run.files import write_json
from ..run.reading import read_json
from ..teacher.config import TrajectoryConfig
from ..teacher.teacher import Teacher
from .config import TransferConfig
from .estimate import (
    Moment,
    count_timed,
    mark,
    say_that_calls_are_timed,
    seconds_between,
    time_teacher,
)
from .student import Student

logger = logging.getLogger(__name__)

COSTS_NAME = "layer_costs.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Seconds of a guided call of a model, for one video, and of what attention takes of it.

    softmax, linear: of the whole call, with no layer linear and with all of them.
    softmax_layer, linear_layer: of the attention of one layer, projections left out.
    num_layers: of the model. is_hybrid: what is called linear has tiles.
    """

    softmax: float
    linear: float
    softmax_layer: float
    linear_layer: float
    num_layers: int
    is_hybrid: bool = False

    def __post_init__(self) -> None:
        seconds = (self.softmax, self.linear, self.softmax_layer, self.linear_layer)
        if not all(isinstance(x, float) and 0 < x < math.inf for x in seconds):
            raise ValueError("a call takes seconds above 0")

    def count_for(self, speedup: float) -> int:
        """Return the smallest number of linear layers that makes a call so many times as fast.

        Each linear layer is taken to save as much as any other.

        Raises SettingError where all layers are too few.
        """
        if speedup > self.softmax / self.linear:
            raise SettingError(self._refuse(speedup), "target", "tile")
        needed = (self.softmax - self.softmax / speedup) / (self.softmax - self.linear)
        # A count that is met exactly is not to be missed by rounding.
        return min(self.num_layers, math.ceil(self.num_layers * needed - 1e-9))

    def describe(self, speedup: float) -> str:
        """Say in a sentence how many layers a speed-up needs, and why."""
        return (
            f"{self._describe_layers()}: {speedup:g}x needs {self.count_for(speedup)} of "
            f"{self.num_layers} layers {self._kind}"
        )

    @property
    def _kind(self) -> str:
        return "hybrid" if self.is_hybrid else "linear"

    def _describe_layers(self) -> str:
        kept, linear = (f"{1000 * x:.3g} ms" for x in (self.softmax_layer, self.linear_layer))
        return f"the attention of a kept layer costs {kept}, of a {self._kind} one {linear}"

    def _refuse(self, speedup: float) -> str:
        most = math.floor(100 * self.softmax / self.linear) / 100
        advice = f"{{target}} {most:g}x or less, or" if most > 1 else "{target}"
        return (
            f"{{target}} {speedup:g}x given, and with all {self.num_layers} layers {self._kind} a "
            f"call of the model is {most:g} times as fast here ({self._describe_layers()}): give "
            f"{advice} a number of layers{', or {tile} none' if self.is_hybrid else ''}"
        )


def find_costs(teacher: Teacher, config: TransferConfig, run: Run) -> LayerCosts | None:
    """Return what layers cost if the target is a speed-up: as the run's folder has it, or measured.

    Of several processes each gets the mean over all.

    Raises SettingError for a speed-up that cannot be reached, and for a file that is damaged.
    """
    speedup = config.selection.speedup
    if speedup is None:
        return None
    costs = _read(run) or _measure(teacher, config, run)
    logger.info("%s", costs.describe(speedup))
    return costs


def with_count(config: TransferConfig, costs: LayerCosts | None) -> TransferConfig:
    """Return the settings of the training: a speed-up's number of layers in its place.

    Sparse softmax layers, which were counted with and have no gradient, are trained as dense ones.

    costs: of `find_costs`.
    """
    if costs is None:
        return config
    changes: dict[str, Any] = {"target": costs.count_for(config.selection.speedup)}
    if config.teacher.softmax.is_sparse:
        changes |= {"softmax_kernel": SoftmaxConfig().softmax_kernel, "density": None}
    return override(config, changes)


def keep_costs(costs: LayerCosts | None, run: Run) -> None:
    """Write what was measured into the run's folder, which binds a repeated run to it."""
    if costs is not None and run.processes.is_first:
        write_json(run.folder / COSTS_NAME, dataclasses.asdict(costs))


def origin_of(config: TransferConfig) -> dict[str, str]:
    """Return what a file's header says of a target that was a speed-up; nothing of a number."""
    if config.selection.speedup is None:
        return {}
    softmax = config.teacher.softmax
    kernel = softmax.softmax_kernel
    if softmax.is_sparse:
        kernel = f"{kernel} at density {_density(softmax):g}"
    return {"target": f"{config.selection.target} beside softmax {kernel}"}


def _read(run: Run) -> LayerCosts | None:
    path = run.folder / COSTS_NAME
    try:
        return LayerCosts(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"{path} is damaged ({error}): delete that file, and the same command measures again "
            "how many layers {target} needs, or choose another {out}",
            "target",
            "out",
        ) from error


def _measure(teacher: Teacher, config: TransferConfig, run: Run) -> LayerCosts:
    say_that_calls_are_timed(teacher)
    device, softmax = teacher.prompt_embeds.device, config.teacher.softmax
    if isinstance(teacher.model, Experts):
        # The other expert's layers are as large.
        teacher = dataclasses.replace(teacher, model=teacher.model.fetch(HIGH, device))
    only_maps = dataclasses.replace(config.student, parameters="feature_maps")
    found: list[float] = []
    with Student(teacher, only_maps, seed=config.seed) as student:
        if softmax.is_sparse:
            for module in student.mixed.values():
                module.softmax = SoftmaxAttention(SPARSE, _density(softmax))
        for linear_layers in ((), (*student.mixed,)):
            student.harden(linear_layers)
            found += _time_call(teacher, config.trajectories, [*student.mixed.values()], run)
        names = ("softmax", "softmax_layer", "linear", "linear_layer")
        means = run.processes.mean(torch.tensor(found, device=device)).tolist()
        about = {"num_layers": len(student.mixed), "is_hybrid": bool(config.student.form.tile)}
        return LayerCosts(**dict(zip(names, means, strict=True)), **about)


def _time_call(
    teacher: Teacher, config: TrajectoryConfig, layers: Sequence[nn.Module], run: Run
) -> tuple[float, float]:
    """Return the seconds of a call of the teacher, and of one layer in it, for one video."""
    device = teacher.prompt_embeds.device
    begun: list[Moment] = []
    spans: list[tuple[Moment, Moment]] = []
    with contextlib.ExitStack() as undo:
        for layer in layers:
            begin = layer.register_forward_pre_hook(lambda *_: begun.append(mark(device)))
            end = layer.register_forward_hook(lambda *_: spans.append((begun.pop(), mark(device))))
            undo.callback(begin.remove)
            undo.callback(end.remove)
        seconds = time_teacher(teacher, config, run.precision)
    of_layer = statistics.median(seconds_between(*span) for span in spans)
    return seconds, of_layer / count_timed(config, device)


def _density(softmax: SoftmaxConfig) -> float:
    return DENSITY if softmax.density is None else softmax.density
