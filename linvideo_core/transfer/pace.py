"""How fast a run's own calls are on the machine at hand, measured before anything long begins."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import make_sigmas
from ..models.velocity import bind_guided
from ..run.context import Run
from ..run.memory import FP32
from ..teacher.teacher import Teacher
from ..teacher.trajectories import States, Trajectories, TrajectoryConfig
from ..training.trainer import seed_step
from .config import TransferConfig
from .layer_selection.rules import SelectionConfig
from .student import Student, TransferTask

# A training step's pass in calls of the guided teacher, both of one video: while layers are chosen
# and after. `adm` with recomputed activations on an H100 (results/scale.json): 8.8 and 6.3 for Wan
# 1.3B, 7.8 while choosing for 14B.
_SELECTING, _HARDENED = 8.3, 6.0
# What Adam and the average add to the gradient and the number itself.
_OPTIMISER = 3 * FP32
# Passes differ: some samples move before they are compared, others do not.
_TIMED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of a run's own calls.

    call: of the teacher with guidance, for one video.
    selecting, hardened: of a training step's forward and backward pass, the whole batch of this
        process, while layers are chosen and after.
    num_trained: numbers that are trained, 0 where no training was tried.
    device_bytes: the peak of all these on a GPU, with the optimiser; None where it is not known.
    """

    call: float
    selecting: float
    hardened: float
    num_trained: int = 0
    device_bytes: int | None = None

    @classmethod
    def from_call(cls, seconds: float, batch_size: int) -> "Pace":
        """Tell a pass's seconds from those of a call; batch_size: of this process."""
        of_batch = seconds * batch_size
        return cls(call=seconds, selecting=_SELECTING * of_batch, hardened=_HARDENED * of_batch)


def time_teacher(teacher: Teacher, config: TrajectoryConfig, precision: str) -> float:
    """Measure the seconds of a guided call of the teacher, of one video of as many as together.

    Raises what the first long stage would: memory that is too small is found here.
    """
    size = min(config.shard_size, config.num_trajectories)
    device = teacher.prompt_embeds.device
    velocity_fn = bind_guided(
        teacher.model,
        teacher.prompt_embeds[:1].expand(size, -1, -1),
        teacher.negative_embeds.expand(size, -1, -1),
        config.guidance_scale,
        precision=precision,
        on_branches=lambda conditional, unconditional: None,
    )
    latents = torch.randn(size, *teacher.latent_shape, generator=seed_step(0, 0)).to(device)
    sigma = torch.ones(size, device=device)
    with torch.no_grad():
        return _time(lambda: velocity_fn(latents, sigma), device) / size


def time_run(
    teacher: Teacher,
    config: TransferConfig,
    precision: str,
    *,
    tries_training: bool = True,
    num_processes: int = 1,
) -> Pace:
    """Measure calls of the teacher and passes of a training that is thrown away.

    tries_training: else a pass is counted in calls; num_processes share a batch.

    The teacher is left as it was; memory that is too small is found here. Nothing is compiled for
    it: a run that is will be faster.
    """
    device = teacher.prompt_embeds.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    call = time_teacher(teacher, config.trajectories, precision)
    pace = Pace.from_call(call, config.training.batch_size // num_processes)
    if not tries_training:
        return pace
    try:
        pace = _time_training(teacher, config, precision, pace)
    finally:
        # A layer's forward refers to the layer: only the collector takes the two apart.
        gc.collect()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) + _OPTIMISER * pace.num_trained
        pace = dataclasses.replace(pace, device_bytes=peak)
        torch.cuda.empty_cache()
    return pace


class RandomStates(Trajectories):
    """Noise in place of a teacher's states, to measure what a training step takes."""

    def __init__(self, teacher: Teacher, config: TrajectoryConfig) -> None:
        """Open no file."""
        self.states_per_trajectory = config.states_per_trajectory
        self.guidance_scale = config.guidance_scale
        self.sigmas = make_sigmas(config.sampler_steps, config.shift)
        self._shape = teacher.latent_shape

    def __len__(self) -> int:
        """Return how many levels there are, one state each."""
        return len(self.sigmas) - 1

    def steps(self) -> Tensor:
        """Return the index into the sampling grid of every state, [len] int64."""
        return torch.arange(len(self))

    def take(self, picks: Tensor, device: torch.device | str) -> States:
        """Draw noise for the states `picks` [B] int64, on `device` in fp32."""
        shape = (len(picks), *self._shape)
        latents, conditional, unconditional = torch.randn(3, *shape, device=device)
        return States(
            latents=latents,
            conditional=conditional,
            unconditional=unconditional,
            step=picks.to(device),
            prompt=torch.zeros_like(picks, device=device),
        )


def _time_training(teacher: Teacher, config: TransferConfig, precision: str, pace: Pace) -> Pace:
    """Return the pace with the seconds of a pass while layers are chosen and after."""
    with Student(teacher, config.student, seed=config.seed) as student:
        return _time_steps(student, teacher, config, precision, pace)


def _time_steps(
    student: Student, teacher: Teacher, config: TransferConfig, precision: str, pace: Pace
) -> Pace:
    task = TransferTask(
        student,
        teacher,
        RandomStates(teacher, config.trajectories),
        selection=SelectionConfig(target=config.selection.target),
        objective=config.objective,
        training=config.training,
        run=Run(precision=precision),
    )
    parameters = [p for group in task.parameter_groups() for p in group.parameters.values()]
    seconds = []
    for _ in range(2):
        seconds.append(_time(_passes_of(task), teacher.prompt_embeds.device))
        student.harden([*student.mixed][: config.selection.target])
    return dataclasses.replace(
        pace,
        selecting=seconds[0],
        hardened=seconds[1],
        num_trained=sum(parameter.numel() for parameter in parameters),
    )


def _passes_of(task: TransferTask) -> Callable[[], object]:
    """Return what makes another training pass each time, forward and backward."""
    steps = itertools.count()

    def run() -> None:
        step = next(steps)
        task.loss(step, seed_step(0, step))[0].backward()

    return run


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of a call that was made once before."""
    call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(_TIMED):
        call()
    _wait(device)
    return (time.perf_counter() - start) / _TIMED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
