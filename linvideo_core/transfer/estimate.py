"""What a run takes, told before anything long begins: hours, memory, disk.

A few calls of the run's own kind are measured, and multiplied by how many there will be.
"""

import dataclasses
import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable

import torch

from ..evaluate.sampler import count_comparing_calls
from ..flow import bind_guided
from ..run.context import Run
from ..run.devices import count_device_bytes
from ..run.files import check_space
from ..run.memory import FP32, show_gb
from ..teacher.config import TrajectoryConfig
from ..teacher.pool import count_filling_calls, count_pool_bytes
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories, count_bytes, count_missing, spread_edges
from ..training.trainer import seed_step
from .config import RunConfig, SelectionConfig, TransferConfig
from .layer_selection import count_selection_steps
from .preflight import Footprint
from .student import Student, TransferTask, make_pool

logger = logging.getLogger(__name__)

# In calls of the guided teacher, all of one video. A training step's pass there and back, while
# layers are chosen and after, and what the moves of `adm` add: with recomputed activations on an
# H100 all of it takes 8.8 and 6.3 for Wan 1.3B, 7.8 while choosing for 14B (results/scale.json). A
# step of the warm start: one branch, and linear attention there and back.
_SELECTING, LEARNING, _MOVES, WARM_START = 6.8, 4.5, 1.5, 0.7
# What Adam and the average add to the gradient and the number itself.
_OPTIMISER = 3 * FP32
# Of a trained number a checkpoint holds four: itself, its average, both averages of Adam. The next
# checkpoint is written before the last one goes. The result holds it once.
_CHECKPOINTS = (2 * 4 + 1) * FP32
# Of a call the median counts, of passes the mean: they differ, since some samples move before they
# are compared and others do not.
_TIMED_CALLS, _TIMED_PASSES = 3, 2
# Most videos in a call that is timed on a CPU, where each takes as long however many there are.
_MOST_ON_CPU = 4

Moment = torch.cuda.Event | float
"""A point in time: an event in a GPU's stream, or seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of a run's own calls.

    call: of the teacher with guidance, for one video.
    selecting, hardened: of a training step's forward and backward pass, the whole batch of this
        process, while layers are chosen and after.
    main_call: as `call`, where that is the mean of several sizes of video: of the main one alone.
    num_trained: numbers that are trained, 0 where no training was tried.
    device_bytes: the peak of all these on a GPU, with the optimiser; None where it is not known.
    """

    call: float
    selecting: float
    hardened: float
    num_trained: int = 0
    device_bytes: int | None = None
    main_call: float | None = None

    @classmethod
    def from_call(cls, seconds: float, batch_size: int, objective: str) -> "Pace":
        """Tell a pass's seconds from those of a call; batch_size: of this process."""
        of_batch, moves = seconds * batch_size, _MOVES if objective == "adm" else 0.0
        selecting, hardened = (of_batch * (calls + moves) for calls in (_SELECTING, LEARNING))
        return cls(call=seconds, selecting=selecting, hardened=hardened)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes.

    sampling, warm_start, training, comparing: seconds. Bytes of a GPU and of CPU memory are None
    where they are not known.
    """

    sampling: float
    warm_start: float
    training: float
    comparing: float
    disk_bytes: int
    device_bytes: int | None = None
    memory_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """All stages together."""
        return self.sampling + self.warm_start + self.training + self.comparing

    def row(self) -> dict[str, float | None]:
        """Return it as a row of a table, in hours and GB of 10^9 bytes."""
        stages = {
            "sampling_hours": self.sampling,
            "training_hours": self.warm_start + self.training,
            "comparing_hours": self.comparing,
        }
        hours = {name: seconds / 3600 for name, seconds in stages.items()}
        sizes = {
            "gpu_gb": self.device_bytes,
            "memory_gb": self.memory_bytes,
            "disk_gb": self.disk_bytes,
        }
        gb = {name: size and size / 1e9 for name, size in sizes.items()}
        return {"hours": self.seconds / 3600, **hours, **gb}

    def sentence(self, device_total: int | None = None) -> str:
        """Say it in one sentence; device_total: bytes of the GPU."""
        seconds = self.seconds
        unit, name = (3600, "hours") if seconds >= 3600 else (60, "minutes")
        parts = {
            "sampling the teacher": self.sampling,
            "training": self.warm_start + self.training,
            "comparing": self.comparing,
        }
        times = ", ".join(f"{n / unit:.1f} {what}" for what, n in parts.items() if n)
        sizes = [f"{show_gb(self.disk_bytes)} of disk"]
        if self.memory_bytes:
            sizes.insert(0, f"{show_gb(self.memory_bytes)} of memory")
        if self.device_bytes:
            of_all = f", which has {show_gb(device_total)}" if device_total else ""
            sizes.insert(0, f"{show_gb(self.device_bytes)} of the GPU{of_all}")
        return f"about {seconds / unit:.1f} {name} ({times}); {', '.join(sizes)}"


def forecast(
    teacher: Teacher,
    config: TransferConfig,
    pace: Pace,
    *,
    precision: str,
    footprint: Footprint | None = None,
    num_done: int = 0,
    num_processes: int = 1,
    num_students: int = 1,
) -> Estimate:
    """Return what a transfer takes that goes at a measured pace.

    footprint: what it takes at least, for what was not measured; needed where training was not
        tried.
    num_done: training steps that were finished earlier. num_students: one an expert.

    Raises ValueError, in one sentence, where a disk has too little room.
    """
    run = Run(folder=config.out, precision=precision, seed=config.seed)
    is_pool = config.pool.states == "pool"
    num_missing = 0 if is_pool else count_missing(teacher, config.trajectories, run)
    num_trained = pace.num_trained or footprint.num_trained
    in_flight = (config.pool.pool_videos, config.training.batch_size)
    pool = count_pool_bytes(teacher.latent_shapes, *in_flight) if is_pool else 0
    found = estimate(
        config,
        pace,
        num_missing=num_missing,
        num_done=num_done,
        num_processes=num_processes,
        num_students=num_students,
        disk_bytes=check_disk(teacher, config, num_missing, num_students * num_trained, pool),
    )
    if footprint is None:
        return found
    return dataclasses.replace(
        found,
        device_bytes=found.device_bytes or footprint.device_bytes,
        memory_bytes=footprint.memory_bytes + pool,
    )


def check_disk(
    teacher: Teacher, config: RunConfig, num_missing: int, num_trained: int, in_flight: int = 0
) -> int:
    """Return the bytes that a run's new samples and its checkpoints take on disk.

    num_trained: numbers, over all trainings. in_flight: bytes of a pool, see `count_pool_bytes`.

    Raises ValueError, in one sentence, where there is too little room.
    """
    samples = count_bytes(config.trajectories, teacher.latent_shape, num_missing)
    # The next checkpoint is written before the last one goes.
    checkpoints = count_checkpoint_bytes(num_trained) + 2 * in_flight
    folder = config.trajectories.folder_beside(config.out)
    check_space(
        [(folder, samples, "the teacher's samples"), (config.out, checkpoints, "the checkpoints")]
    )
    return samples + checkpoints


def announce(found: Estimate, device: torch.device | str) -> None:
    """Log what a run on a device takes."""
    logger.info("this run takes %s", found.sentence(count_device_bytes(str(device))))


def estimate(
    config: TransferConfig,
    pace: Pace,
    *,
    num_missing: int,
    disk_bytes: int,
    num_done: int = 0,
    num_processes: int = 1,
    num_students: int = 1,
) -> Estimate:
    """Return what a transfer takes, from its own pace and arithmetic.

    num_missing: videos that the teacher has still to sample, see `count_missing`; of a pool, whose
        videos are brought to their places instead, none.
    num_done: training steps that a checkpoint holds; the warm start is over then.
    disk_bytes: of samples and checkpoints.
    """
    training = config.training
    selecting = 0
    if config.selection.rule == "learned":
        selecting = count_selection_steps(config.selection, training.steps)
    num_selecting = max(0, selecting - num_done)
    num_hardened = training.steps - max(selecting, num_done)
    passes = num_selecting * pace.selecting + num_hardened * pace.hardened
    warm_steps = 0 if num_done else config.warm_start.warm_start_steps
    num_calls = -(-num_missing // num_processes) * config.trajectories.sampler_steps
    # Of a pool, each state of the warm start is also asked for both branches.
    of_warm_start = WARM_START
    if config.pool.states == "pool":
        of_warm_start += 1
        if not num_done:
            filling = count_filling_calls(
                config.trajectories,
                config.pool.pool_videos,
                training.batch_size,
                1 + len(config.pool.sizes),
            )
            num_calls += filling // num_processes
    warm_start = warm_steps * training.batch_size / num_processes * of_warm_start * pace.call
    # Of the teacher, the layers merely swapped, and the student; the first process alone.
    comparing = count_comparing(config, num_students=2)
    return Estimate(
        sampling=num_calls * pace.call,
        warm_start=num_students * warm_start,
        training=num_students * training.accumulation * passes,
        comparing=comparing * (pace.main_call or pace.call),
        disk_bytes=disk_bytes,
        device_bytes=pace.device_bytes,
    )


def count_comparing(config: RunConfig, *, num_students: int) -> float:
    """Return what a run's comparison in the end takes, see `count_comparing_calls`."""
    evaluation, steps = config.evaluation, config.trajectories.sampler_steps
    samples, size = evaluation.evaluate_samples, evaluation.evaluate_batch_size
    return count_comparing_calls(samples, size, steps, num_students=num_students)


def count_checkpoint_bytes(num_trained: int) -> int:
    """Return what a training's checkpoints take on disk at most, and its result."""
    return _CHECKPOINTS * num_trained


def time_run(
    teacher: Teacher,
    config: TransferConfig,
    *,
    precision: str,
    tries_training: bool = True,
    num_processes: int = 1,
) -> Pace:
    """Measure calls of the teacher and passes of a training that is thrown away.

    tries_training: else a pass is counted in calls; num_processes share a batch.

    The teacher is left as it was; memory that is too small is found here. Nothing is compiled for
    it: a run that is will be faster. Of several sizes of video, each is drawn as often: seconds are
    a mean over them.
    """
    say_that_calls_are_timed(teacher)
    alone = [
        dataclasses.replace(teacher, latent_shape=shape, more_shapes=())
        for shape in teacher.latent_shapes
    ]
    how = {"tries_training": tries_training, "num_processes": num_processes}
    paces = [_time_size(each, config, precision=precision, **how) for each in alone]
    seconds = {
        name: sum(getattr(pace, name) for pace in paces) / len(paces)
        for name in ("call", "selecting", "hardened")
    }
    peak = max(pace.device_bytes or 0 for pace in paces) or None
    return dataclasses.replace(paces[0], **seconds, device_bytes=peak, main_call=paces[0].call)


def _time_size(
    teacher: Teacher,
    config: TransferConfig,
    *,
    precision: str,
    tries_training: bool,
    num_processes: int,
) -> Pace:
    device = teacher.prompt_embeds.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    call = time_teacher(teacher, config.trajectories, precision)
    if not tries_training:
        batch_size = config.training.batch_size // num_processes
        return Pace.from_call(call, batch_size, config.objective.objective)
    try:
        pace = _time_training(teacher, config, precision, call)
    finally:
        # A layer's forward refers to the layer: only the collector takes the two apart.
        gc.collect()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) + _OPTIMISER * pace.num_trained
        pace = dataclasses.replace(pace, device_bytes=peak)
        torch.cuda.empty_cache()
    return pace


def time_teacher(teacher: Teacher, config: TrajectoryConfig, precision: str) -> float:
    """Measure the seconds of a guided call of the teacher, of one video of as many as together.

    Raises ValueError, in one sentence, where what it gives is no velocity.
    """
    device = teacher.prompt_embeds.device
    size = count_timed(config, device)
    prompt_embeds = teacher.prompt_embeds[:1].expand(size, -1, -1)
    velocity_fn = bind_guided(
        teacher.model,
        prompt_embeds,
        teacher.negatives_for(prompt_embeds),
        config.guidance_scale,
        precision=precision,
        on_branches=lambda conditional, unconditional: None,
    )
    latents = torch.randn(size, *teacher.latent_shape, generator=seed_step(0, 0)).to(device)
    sigma = torch.ones(size, device=device)
    velocity = latents

    def call() -> None:
        nonlocal velocity
        velocity = velocity_fn(latents, sigma)

    with torch.no_grad():
        seconds = _time(call, device, _TIMED_CALLS)
    if not velocity.isfinite().all() or not velocity.any():
        found = "NaN or infinite" if velocity.any() else "0 everywhere"
        raise ValueError(
            f"the velocity of {teacher.name} is {found} at noise, and no trained model's is: get "
            "its checkpoint again, or give another"
        )
    return statistics.median(seconds) / size


def count_timed(config: TrajectoryConfig, device: torch.device) -> int:
    """Return how many videos go through the teacher in a call that is timed: as in the run's own.

    On a CPU few, so that it is soon known what the run takes.
    """
    together = min(config.shard_size, config.num_trajectories)
    return min(together, _MOST_ON_CPU) if device.type == "cpu" else together


def say_that_calls_are_timed(teacher: Teacher) -> None:
    """Log what the next calls are for; with a large model they take minutes."""
    logger.info(
        "timing a few calls of %s on %s, to tell what this run takes",
        teacher.name,
        teacher.prompt_embeds.device,
    )


class _RandomStates(Trajectories):
    """A video of noise in place of the teacher's, to measure what a training step takes."""

    def __init__(self, teacher: Teacher, config: TrajectoryConfig) -> None:
        super().__init__([], config)
        shape = (config.states_per_trajectory, *teacher.latent_shape)
        names = ("latents", "conditional", "unconditional")
        video = {name: torch.randn(shape).half() for name in names}
        video |= {"step": spread_edges(config)[:-1], "prompt": torch.zeros((), dtype=torch.int64)}
        self._videos = [video]


def _time_training(teacher: Teacher, config: TransferConfig, precision: str, call: float) -> Pace:
    """Measure passes, forward and backward, while layers are chosen and after."""
    with Student(teacher, config.student, seed=config.seed) as student:
        run = Run(precision=precision)
        if config.pool.states == "pool":
            states = make_pool(student, teacher, config, run)
        else:
            states = _RandomStates(teacher, config.trajectories)
        task = TransferTask(
            student,
            teacher,
            states,
            selection=SelectionConfig(target=config.selection.target),
            objective=config.objective,
            training=config.training,
            run=run,
        )
        parameters = [p for group in task.parameter_groups() for p in group.parameters.values()]

        def time_passes() -> float:
            steps = itertools.count()

            def run_pass() -> None:
                step = next(steps)
                task.loss(step, seed_step(0, step))[0].backward()

            device = teacher.prompt_embeds.device
            return statistics.fmean(_time(run_pass, device, _TIMED_PASSES))

        selecting = time_passes()
        student.harden([*student.mixed][: config.selection.target])
        return Pace(
            call=call,
            selecting=selecting,
            hardened=time_passes(),
            num_trained=sum(parameter.numel() for parameter in parameters),
        )


def mark(device: torch.device) -> Moment:
    """Return this moment, on a GPU that of all work that was queued before."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Moment, end: Moment) -> float:
    """Return the seconds between two moments of one device; on a GPU, wait for the second."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _time(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Return the seconds of each of `count` calls, after one that is not timed."""
    call()
    moments = [mark(device)]
    for _ in range(count):
        call()
        moments.append(mark(device))
    return list(itertools.starmap(seconds_between, itertools.pairwise(moments)))
