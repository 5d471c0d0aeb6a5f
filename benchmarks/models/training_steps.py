"""Measure training steps at real sizes: `python -m benchmarks.models.training_steps`.

The steps are `transfer`'s own, of a model with random weights in the published shapes on random
states: time and memory do not depend on what a model has learned. Every video moves on before it is
compared (`--anchor-share 0`), the most expensive step of `adm`. With torchrun the processes share
the work as `transfer` does, a batch for each, and the speed-up is in videos a second over one GPU.
    python -m benchmarks.models.training_steps --size 1.3b-480p
    torchrun --nproc-per-node 2 -m benchmarks.models.training_steps --size 1.3b-480p
    python -m benchmarks.models.training_steps --size 1.3b-480p --frozen bf16 --cap-gb 24
    python -m benchmarks.models.training_steps --size tiny --device cpu
Rows of one size, way to train and number of GPUs replace earlier ones in --out or results.
"""

import contextlib
import dataclasses
import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.models.config import FrozenConfig
from linvideo_core.run import limits
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option, resolve_device, resolve_precision
from linvideo_core.run.errors import SettingError
from linvideo_core.run.memory import explained, number_of_gpu
from linvideo_core.run.process_group import SINGLE_PROCESS, ProcessGroup
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.training import fsdp
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import fit
from linvideo_core.transfer.config import (
    ObjectiveConfig,
    SelectionConfig,
    StudentConfig,
    check_frozen_weights,
    check_offload_alone,
)
from linvideo_core.transfer.student import Student, TransferTask, accelerated

from ..record import (
    RESULTS_FOLDER,
    change_part,
    check_parts,
    describe_device,
    show_rows,
)
from .cli import RECORD_NAME, RECORD_TITLE
from .measuring import free_memory
from .random_models import draw_states, make_random_teacher
from .sizes import SIZES, Size, count_flops, find_peak, linear_flops, softmax_flops

GB = 2**30
"""Bytes of a GB as cards are sold by it, and as PyTorch says what is in use."""

LOWER_STEPS = "give --frozen fp8, more --offload-blocks or a lower --batch-per-gpu"
"""What makes a step need less."""

PHASES = ("selecting", "hardened")

_WAY = ("trained", "frozen", "offloaded", "recomputed", "compiled", "cap_gb")
_KEY = ("model", "resolution", "gpus", "phase", *_WAY)

# What the rows of this command are called in a record that others fill, too.
_PART = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsConfig(Settings):
    """Which steps of a transfer are measured, and how many."""

    size: str = option("1.3b-480p", "model and video", choices=tuple(SIZES))
    phase: str = option(
        "both", "every layer both ways, or after the choice", choices=("both", *PHASES)
    )
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    batch_per_gpu: int = option(1, "videos of a step on each GPU", limits.COUNT)
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    recomputed: bool = option(True, "recompute blocks backward to save memory")
    compile: bool = option(False, "compile the blocks")
    untimed_steps: int = option(2, "steps before the first one that is timed", limits.COUNT)
    timed_steps: int = option(5, "steps behind a time, which is their median", limits.COUNT)
    device: str = device_option()
    cap_gb: float | None = option(
        None,
        "memory of the GPU that may be used, in GB of 2^30 bytes, as cards have; none: all",
        limits.POSITIVE,
    )
    out: Path = option(Path("runs/scale-training"), "folder of what was measured")
    record: bool = option(False, "write results/scale.json, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_blocks = self.frozen_weights.offload_blocks
        if num_blocks and not self.recomputed:
            raise SettingError(
                f"{{offload_blocks}} {num_blocks} was given with {{recomputed}} false; the way "
                "back would keep all blocks on the device: leave one of them out",
                "offload_blocks",
                "recomputed",
            )
        training = TrainingConfig(activation_checkpointing=self.recomputed, compile=self.compile)
        is_full = self.student.parameters == "full"
        check_frozen_weights(self.frozen_weights, training, "parameters" if is_full else "")
        if num_blocks > (most := SIZES[self.size].config.num_layers):
            raise SettingError(
                f"{{offload_blocks}} {num_blocks} given; {self.size} has {most} blocks",
                "offload_blocks",
            )


@contextlib.contextmanager
def capped(device: str, cap_gb: float | None) -> Iterator[None]:
    """Let PyTorch's allocator give out no more than so much of a GPU's memory for a while.

    Raises SettingError where it cannot be capped so.
    """
    if cap_gb is None:
        yield
        return
    if not device.startswith("cuda"):
        raise SettingError(
            f"{{cap_gb}} {cap_gb:g} given on {device}; a GPU's memory alone can be capped", "cap_gb"
        )
    total = torch.cuda.mem_get_info(device)[1]
    if cap_gb * GB > total:
        raise SettingError(
            f"{{cap_gb}} {cap_gb:g} given; {device} has {total / GB:.1f} GB in all", "cap_gb"
        )
    index = number_of_gpu(device)
    torch.cuda.set_per_process_memory_fraction(cap_gb * GB / total, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


class StepClock(Callbacks):
    """Keeps the seconds of the last stage's steps, and the memory at their peak.

    untimed_steps: the first ones, which do not count for the peak either; peak_gb: None without a
    GPU.
    """

    def __init__(self, device: str, untimed_steps: int = 0) -> None:
        self.untimed_steps = untimed_steps
        self.peak_gb: float | None = None
        self.device, self._times = torch.device(device), [0.0]

    def on_stage(self, stage: str, total: int, done: int = 0, detail: str = "") -> None:
        """Take the time at which a stage begins."""
        self._times = [self._now()]

    def on_step_end(self, done: int, **metrics: float) -> None:
        """Take the time of a step."""
        self._times.append(self._now())
        if self.device.type == "cuda":
            self.peak_gb = torch.cuda.max_memory_allocated(self.device) / GB
            if done <= self.untimed_steps:
                torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def step_seconds(self) -> list[float]:
        """The seconds of each step that is timed."""
        return [end - begin for begin, end in itertools.pairwise(self._times)][self.untimed_steps :]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def count_step_flops(size: Size, *, phase: str, parameters: str) -> int:
    """Return the operations of an `adm` step for one video.

    The student jumps by both guidance branches, then teacher and student are asked; the student's
    call is also taken backward. Matrix products alone, as in `count_flops`; nothing computed again
    is counted twice. Backward takes as much as forward for a frozen projection, whose weight needs
    no gradient, and twice as much for one that learns and for attention.
    """
    num_layers, L, dim = size.config.num_layers, size.tokens, size.config.dim
    num_linear = len(size.layers)
    per_linear = linear_flops(L, dim, dim // size.config.num_heads)
    teacher = count_flops(size, 0)
    if phase == "selecting":
        student = teacher + num_layers * per_linear
        attention = num_layers * (softmax_flops(L, dim) + per_linear)
    else:
        student = count_flops(size, num_linear)
        attention = num_linear * per_linear + (num_layers - num_linear) * softmax_flops(L, dim)
    learned = 2 if parameters == "full" else 1
    backward = learned * (student - attention) + 2 * attention
    return 3 * student + teacher + backward


def measure_steps(teacher: Teacher, phase: str, config: StepsConfig, run: Run) -> dict[str, Any]:
    """Train for a few steps as `transfer` does; return a row of the table without its speed-up.

    run: whose folder is emptied, and whose callbacks are a clock of its own.
    """
    size, processes = SIZES[config.size], run.processes
    if processes.is_first:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
    processes.wait()
    num_steps = config.untimed_steps + config.timed_steps
    is_hardened = phase == "hardened"
    training = TrainingConfig(
        steps=num_steps,
        batch_size=config.batch_per_gpu * processes.size,
        checkpoint_every=num_steps,
        log_every=num_steps,
        warmup_steps=1,
        activation_checkpointing=config.recomputed,
        compile=config.compile,
    )
    listed = ",".join(map(str, size.layers)) if is_hardened else None
    clock = StepClock(run.device, config.untimed_steps)
    run = dataclasses.replace(run, callbacks=clock)
    with Student(teacher, config.student, seed=run.seed) as student:
        task = TransferTask(
            student,
            teacher,
            draw_states(size, run.folder / f"states-{processes.rank}.safetensors"),
            selection=SelectionConfig(target=len(size.layers), layers=listed, selection_share=1.0),
            # Every video moves on: of a batch of one, half of the steps would otherwise be cheap.
            objective=ObjectiveConfig(objective="adm", anchor_share=0.0),
            training=training,
            run=run,
            linear_layers=size.layers if is_hardened else None,
        )
        with accelerated(task.models, student, training, run):
            fit(task, training, run.below("fit"))
    return _make_row(size, phase, config, processes.size, clock)


def _make_row(
    size: Size, phase: str, config: StepsConfig, gpus: int, clock: StepClock
) -> dict[str, Any]:
    seconds = statistics.median(clock.step_seconds)
    flops = config.batch_per_gpu * count_step_flops(
        size, phase=phase, parameters=config.student.parameters
    )
    peak = find_peak(describe_device(clock.device))
    return {
        "model": size.model,
        "resolution": size.resolution,
        "what": _PART,
        "linear_layers": len(size.layers),
        "baseline": "1 gpu",
        "speedup": None,
        "seconds": seconds,
        "peak_gb": clock.peak_gb,
        "mfu": flops / seconds / peak if peak else None,
        "gpus": gpus,
        "phase": phase,
        "trained": config.student.parameters,
        "frozen": config.frozen_weights.frozen,
        "offloaded": config.frozen_weights.offload_blocks,
        "recomputed": config.recomputed,
        "compiled": config.compile,
        "batch_per_gpu": config.batch_per_gpu,
        "cap_gb": config.cap_gb,
    }


def run(config: StepsConfig, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any] | None:
    """Measure, and write the record; return it, None on all processes but the first.

    Rows that are not measured again stay in the record.
    Raises ValueError, before anything is measured, where it has rows of another device.
    """
    device = processes.place(resolve_device(config.device))
    check_offload_alone(config.frozen_weights, processes.size)
    path = (RESULTS_FOLDER if config.record else config.out) / RECORD_NAME
    check_parts(path, device)
    where = Run(
        folder=config.out / "steps",
        device=device,
        precision=resolve_precision("auto", device),
        processes=processes,
    )
    new = []
    with capped(device, config.cap_gb):
        for phase in PHASES if config.phase == "both" else (config.phase,):
            teacher = make_random_teacher(SIZES[config.size], device, config.frozen_weights)
            new.append(measure_steps(teacher, phase, config, where))
            del teacher
            free_memory()
    if not processes.destroy():
        return None
    shutil.rmtree(where.folder, ignore_errors=True)
    launch = f"torchrun --nproc-per-node {processes.size}" if processes.size > 1 else "python"
    words = f"-m benchmarks.models.training_steps --size {config.size}"
    flags = to_flags(config, without=["out", "record", "size"])
    return change_part(
        path,
        _PART,
        lambda earlier, source: (
            compare_rows(list({_key(row): row for row in [*earlier, *new]}.values())),
            source,
        ),
        title=RECORD_TITLE,
        command=f"{launch} {words} {flags}".strip(),
        device=device,
    )


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give each row its speed-up over the one of its kind on one GPU: in videos a second."""

    def pace(row: Mapping[str, Any]) -> float:
        return row["gpus"] * row["batch_per_gpu"] / row["seconds"]

    by_key = {_key(row): row for row in rows}
    alone = [by_key.get(_key({**row, "gpus": 1})) for row in rows]
    return [
        {**row, "speedup": pace(row) / pace(one) if one else None}
        for row, one in zip(rows, alone, strict=True)
    ]


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in _KEY)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(StepsConfig, argv, description=__doc__)
    fsdp.run_together(lambda processes: _measure_and_show(config, processes))


def _measure_and_show(config: StepsConfig, processes: ProcessGroup) -> None:
    with explained(LOWER_STEPS):
        record = run(config, processes)
    if record is not None:
        rows = [row for row in record["rows"] if row["what"] == _PART]
        sys.stdout.write(f"\n{show_rows(rows)}\n")


if __name__ == "__main__":
    run_command(main)
