"""What a run takes, told before anything long begins: hours, memory, disk.

A few calls of the run's own kind are measured, and multiplied by how many there will be.
"""

import dataclasses
import logging

import torch

from ..run.context import Run
from ..run.files import check_space
from ..run.memory import FP32, show_gb
from ..teacher.teacher import Teacher
from ..teacher.trajectories import count_bytes, count_missing
from ..training.checkpoint import finished_steps
from .config import TRAINING_NAME, TransferConfig
from .layer_selection.rules import count_selection_steps
from .pace import Pace, time_run

logger = logging.getLogger(__name__)

# The warm start of one video in calls of the guided teacher: one branch, and linear attention there
# and back.
_WARM_START = 0.7
# Of a trained number a checkpoint holds four: itself, its average, both averages of Adam. The next
# checkpoint is written before the last one goes.
_CHECKPOINTS = 2 * 4 * FP32


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
        """All of it."""
        return self.sampling + self.warm_start + self.training + self.comparing

    @property
    def hours(self) -> float:
        """All of it, in hours."""
        return self.seconds / 3600

    def sentence(self, device_total: int | None = None) -> str:
        """Say it in one sentence; device_total: bytes of the GPU."""
        unit, name = (3600, "hours") if self.seconds >= 3600 else (60, "minutes")
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
        return f"about {self.seconds / unit:.1f} {name} ({times}); {', '.join(sizes)}"


def estimate(
    config: TransferConfig,
    pace: Pace,
    *,
    num_missing: int,
    disk_bytes: int,
    num_done: int = 0,
    num_processes: int = 1,
    num_students: int = 1,
    device_bytes: int | None = None,
    memory_bytes: int | None = None,
) -> Estimate:
    """Return what a transfer takes, from its own pace and arithmetic.

    num_missing: videos that the teacher has still to sample, see `count_missing`.
    num_done: training steps that a checkpoint holds; the warm start is over then.
    disk_bytes: of samples and checkpoints. num_students: one an expert.
    device_bytes: at least, where the pace does not know the peak; memory_bytes: of the CPU.
    """
    training, evaluation = config.training, config.evaluation
    steps = config.trajectories.sampler_steps
    selecting = 0
    if config.selection.rule == "learned":
        selecting = count_selection_steps(config.selection, training.steps)
    num_selecting = max(0, selecting - num_done)
    num_hardened = training.steps - max(selecting, num_done)
    a_pass = num_selecting * pace.selecting + num_hardened * pace.hardened
    share = training.batch_size / num_processes
    warm_steps = 0 if num_done else config.warm_start.warm_start_steps
    warm_start = warm_steps * share * _WARM_START * pace.call
    # The teacher, the layers merely swapped, and the student; the first process alone.
    comparing = 3 * evaluation.evaluate_samples * steps * pace.call
    return Estimate(
        sampling=-(-num_missing // num_processes) * steps * pace.call,
        warm_start=num_students * warm_start,
        training=num_students * training.accumulation * a_pass,
        comparing=comparing,
        disk_bytes=disk_bytes,
        device_bytes=pace.device_bytes or device_bytes,
        memory_bytes=memory_bytes,
    )


def count_checkpoint_bytes(num_trained: int) -> int:
    """Return what a training's checkpoints take on disk at most, and its result."""
    return (_CHECKPOINTS + FP32) * num_trained


def forecast(
    teacher: Teacher,
    config: TransferConfig,
    precision: str,
    *,
    tries_training: bool = True,
    num_trained: int = 0,
    num_processes: int = 1,
    num_students: int = 1,
    device_bytes: int | None = None,
    memory_bytes: int | None = None,
) -> Estimate:
    """Measure a transfer's pace, log what it takes, and return it.

    num_trained: where training is not tried; the others see `estimate`.

    Raises ValueError, in one sentence, where a disk has too little room.
    """
    root = config.trajectories.folder_beside(config.out)
    run = Run(folder=config.out, precision=precision, seed=config.seed)
    num_missing = count_missing(teacher, config.trajectories, run)
    pace = time_run(
        teacher,
        config,
        precision,
        tries_training=tries_training,
        num_processes=num_processes,
    )
    num_trained = pace.num_trained or num_trained
    samples = count_bytes(config.trajectories, teacher.latent_shape, num_missing)
    checkpoints = num_students * count_checkpoint_bytes(num_trained)
    check_space(
        [(root, samples, "the teacher's samples"), (config.out, checkpoints, "the checkpoints")]
    )
    found = estimate(
        config,
        pace,
        num_missing=num_missing,
        num_done=finished_steps(config.out / TRAINING_NAME) if num_students == 1 else 0,
        num_processes=num_processes,
        num_students=num_students,
        disk_bytes=samples + checkpoints,
        device_bytes=device_bytes,
        memory_bytes=memory_bytes,
    )
    device = teacher.prompt_embeds.device
    total = None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    logger.info("this run takes %s", found.sentence(total))
    return found
