"""Measure training steps at real sizes: `python -m benchmarks.models.training_steps`.

The steps are `transfer`'s own, of a model with random weights in the published shapes on random
states: time and memory do not depend on what a model has learned. Every video moves on before it is
compared (`--anchor-share 0`), the dearest that a step of `adm` can be. With torchrun the processes
share the work as `transfer` does, a batch for each, and the speed-up is in videos a second over one
GPU.
    python -m benchmarks.models.training_steps --size 1.3b-480p
    torchrun --nproc-per-node 2 -m benchmarks.models.training_steps --size 1.3b-480p
    python -m benchmarks.models.training_steps --size 1.3b-480p --frozen bf16 --cap-gb 24
    python -m benchmarks.models.training_steps --size tiny --device cpu
Rows of one size, way to train and number of GPUs replace earlier ones in --out or results.
"""

import contextlib
import dataclasses
import gc
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import (
    RESULTS_FOLDER,
    check_parts,
    describe_device,
    read_part,
    write_part,
)

from linvideo_core.models.attention_sites import blocks, compiled_blocks
from linvideo_core.models.quantized import FrozenConfig
from linvideo_core.run.config import option, parse, positive, run_command, to_flags, to_json
from linvideo_core.run.devices import (
    device_option,
    precision_option,
    resolve_device,
    resolve_precision,
)
from linvideo_core.run.memory import explained, number_of_gpu
from linvideo_core.run.process_group import SINGLE_PROCESS, ProcessGroup
from linvideo_core.run.progress import Progress, TqdmProgress, silent
from linvideo_core.run.tables import render_table
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.training import fsdp
from linvideo_core.training.trainer import TrainingConfig, fit
from linvideo_core.transfer.frozen_weights import check_frozen_weights, check_offload_alone
from linvideo_core.transfer.layer_selection.rules import SelectionConfig
from linvideo_core.transfer.objectives import ObjectiveConfig
from linvideo_core.transfer.student import Student, StudentConfig, TransferTask

from .arithmetic import count_flops, find_peak, linear_flops, softmax_flops
from .random_teacher import draw_states, make_random_subject
from .runs import RECORD_NAME, RECORD_TITLE
from .sizes import SIZES, Size

GB = 2**30
"""Bytes of a GB as cards are sold by it, and as PyTorch says what is in use."""

LOWER_STEPS = "give --frozen fp8, more --offload-blocks or a lower --batch-per-gpu"
"""What makes a step need less."""


@contextlib.contextmanager
def capped(device: str, cap_gb: float | None) -> Iterator[None]:
    """Let PyTorch's allocator give out no more than so much of a GPU's memory for a while.

    Raises ValueError, in one sentence, where more is asked for, and where it cannot be capped.
    """
    if cap_gb is None:
        yield
        return
    if not device.startswith("cuda"):
        raise ValueError(
            f"--cap-gb {cap_gb:g} given on {device}; a GPU's memory alone can be capped"
        )
    total = torch.cuda.mem_get_info(device)[1]
    if cap_gb * GB > total:
        raise ValueError(f"--cap-gb {cap_gb:g} given; {device} has {total / GB:.1f} GB in all")
    index = number_of_gpu(device)
    torch.cuda.set_per_process_memory_fraction(cap_gb * GB / total, index)
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(device) / GB
        raise ValueError(
            f"--cap-gb {cap_gb:g} is too little: {peak:.1f} GB were in use when more was asked "
            f"for; {LOWER_STEPS}"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


PHASES = ("selecting", "hardened")

# The paper's length of a transfer, and of it the share that `transfer` spends choosing layers.
PUBLISHED_STEPS = 3000
_SELECTION_SHARE = SelectionConfig().selection_share

_WAY = ("trained", "frozen", "offloaded", "recomputed", "compiled", "cap_gb")
_KEY = ("model", "resolution", "gpus", "phase", *_WAY)


def keep_last(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return runs with the rows that no later one has measured again; without rows, it is gone."""
    kept, seen = [], set()
    for run in reversed(runs):
        rows = [row for row in run["rows"] if _key(row) not in seen]
        seen.update(map(_key, rows))
        if rows:
            kept.append({**run, "rows": rows})
    return kept[::-1]


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give each row its speed-up over the one of its kind on one GPU: in videos a second."""
    by_key = {_key(row): row for row in rows}
    compared = []
    for row in rows:
        alone = by_key.get(_key({**row, "gpus": 1}))
        speedup = None
        if alone is not None:
            pace, pace_alone = (r["gpus"] * r["batch_per_gpu"] / r["seconds"] for r in (row, alone))
            speedup = pace / pace_alone
        compared.append({**row, "speedup": speedup})
    return compared


def count_hours(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the GPU hours of the paper's steps for every way to train with both phases."""
    names = [name for name in (*_KEY, "batch_per_gpu") if name != "phase"]
    kinds: dict[tuple, dict[str, float]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[n] for n in names), {})[row["phase"]] = row["seconds"]
    found = []
    for key, seconds in kinds.items():
        if len(seconds) == len(PHASES):
            kind = dict(zip(names, key, strict=True))
            share = _SELECTION_SHARE
            step = share * seconds["selecting"] + (1 - share) * seconds["hardened"]
            found.append({**kind, "gpu_hours": kind["gpus"] * PUBLISHED_STEPS * step / 3600})
    return found


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in _KEY)


COMMAND = "python -m benchmarks.models.training_steps"

# What the rows of this command are called in a record that others fill, too.
_PART = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Which steps of a transfer are measured, and how many."""

    size: str = option("1.3b-480p", "model and video", choices=tuple(SIZES))
    phase: str = option(
        "both", "every layer both ways, or after the choice", choices=("both", *PHASES)
    )
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    batch_per_gpu: int = option(1, "videos of a step on each GPU")
    frozen_weights: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    recomputed: bool = option(True, "recompute blocks backward to save memory")
    compile: bool = option(False, "compile the blocks")
    untimed_steps: int = option(2, "steps before the first one that is timed")
    timed_steps: int = option(5, "steps behind a time, which is their median")
    seed: int = option(0, "seed of weights and states")
    device: str = device_option()
    precision: str = precision_option()
    cap_gb: float | None = option(
        None, "memory of the GPU that may be used, in GB of 2^30 bytes, as cards have; none: all"
    )
    out: Path = option(Path("runs/scale-training"), "folder of what was measured")
    record: bool = option(False, "write results/scale.json, not the one in --out")

    def __post_init__(self) -> None:
        positive(self, "batch_per_gpu", "untimed_steps", "timed_steps")
        if self.cap_gb is not None:
            positive(self, "cap_gb")
        if self.frozen_weights.offload_blocks and not self.recomputed:
            raise ValueError(
                f"--offload-blocks {self.frozen_weights.offload_blocks} was given with "
                "--recomputed false; the way back would keep all blocks on the device: leave "
                "one of them out"
            )
        training = TrainingConfig(activation_checkpointing=self.recomputed, compile=self.compile)
        is_full = self.student.parameters == "full"
        check_frozen_weights(self.frozen_weights, training, "--parameters full" if is_full else "")
        if self.frozen_weights.offload_blocks > (most := SIZES[self.size].config.num_layers):
            raise ValueError(
                f"--offload-blocks {self.frozen_weights.offload_blocks} given; {self.size} has "
                f"{most} blocks"
            )


class _Clock:
    """Hears of a training's steps; keeps their seconds and the memory at their peak.

    step_seconds: of each step after the untimed ones; peak_gb: None without a GPU.
    """

    def __init__(self, device: str, untimed_steps: int, progress: Progress) -> None:
        self.device = device
        self.untimed_steps = untimed_steps
        self.progress = progress
        self.step_seconds: list[float] = []
        self.peak_gb: float | None = None
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        is_cuda = self.device.startswith("cuda")
        if is_cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if done > self.untimed_steps:
            self.step_seconds.append(now - self._last)
        elif is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        if done == total and is_cuda:
            self.peak_gb = torch.cuda.max_memory_allocated(self.device) / GB
        self.progress(stage, done, total, **metrics)
        self._last = time.perf_counter()


def count_step_flops(size: Size, *, phase: str, parameters: str) -> int:
    """Return the operations of an `adm` step for one video.

    The student jumps by both guidance branches, then teacher and student are asked; the student's
    call is also taken backward. Matrix products alone, as in `arithmetic`; nothing computed again
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


def measure_steps(
    teacher: Teacher,
    size: Size,
    phase: str,
    config: StepsConfig,
    *,
    device: str,
    precision: str,
    progress: Progress,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Train for a few steps as `transfer` does; return a row of the table without its speed-up."""
    folder = config.out / "steps"
    if processes.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
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
    layers = list(size.layers) if is_hardened else None
    listed = ",".join(map(str, size.layers)) if is_hardened else None
    student = Student(teacher, config.student, seed=config.seed)
    task = TransferTask(
        student,
        teacher,
        draw_states(size, folder / f"states-{processes.rank}.safetensors", config.seed),
        selection=SelectionConfig(target=len(size.layers), layers=listed, selection_share=1.0),
        # Every video moves on: of a batch of one, half of the steps would otherwise be cheap.
        objective=ObjectiveConfig(anchor_share=0.0),
        training=training,
        precision=precision,
        layers=layers,
        processes=processes,
    )
    clock = _Clock(device, config.untimed_steps, progress)
    compiled = [student.model, teacher.model] if config.compile else []
    depths = [blocks(model, student.sites) for model in task.models]
    with compiled_blocks(compiled, student.sites), processes.sharded(task.models, depths):
        fit(task, training, folder / "fit", seed=config.seed, progress=clock, processes=processes)
    return _make_row(size, phase, config, processes.size, clock)


def _make_row(
    size: Size, phase: str, config: StepsConfig, gpus: int, clock: _Clock
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


def run(
    config: StepsConfig, progress: Progress = silent, processes: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Any] | None:
    """Measure, and write the record; return it, None on all processes but the first.

    Raises ValueError, before anything is measured, where the record has rows of another device.
    """
    device = processes.place(resolve_device(config.device))
    precision = resolve_precision(config.precision, device)
    size = SIZES[config.size]
    check_offload_alone(config.frozen_weights, processes.size)
    path = (RESULTS_FOLDER if config.record else config.out) / RECORD_NAME
    check_parts(path, device)
    rows = []
    with capped(device, config.cap_gb):
        for phase in PHASES if config.phase == "both" else (config.phase,):
            teacher = make_random_subject(size, device, config.frozen_weights, config.seed)
            settings = {"device": device, "precision": precision, "progress": progress}
            rows.append(
                measure_steps(teacher, size, phase, config, **settings, processes=processes)
            )
            del teacher
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    if not processes.destroy():
        return None
    shutil.rmtree(config.out / "steps", ignore_errors=True)
    return _write(path, {"command": _told(config, processes.size), "rows": rows}, device)


def _told(config: StepsConfig, gpus: int) -> str:
    """Return what to type to measure this again."""
    flags = to_flags(config, without=["out", "record", "size"])
    launch = f"torchrun --nproc-per-node {gpus}" if gpus > 1 else "python"
    return f"{launch} {COMMAND.removeprefix('python ')} --size {config.size} {flags}".strip()


def _write(path: Path, run_found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Put a run into the record: what it did not measure again stays."""
    runs = keep_last([*read_part(path, _PART).get("runs", []), run_found])
    rows = compare_rows([row for each in runs for row in each["rows"]])
    return write_part(
        path,
        _PART,
        title=RECORD_TITLE,
        command=" && ".join(dict.fromkeys(each["command"] for each in runs)),
        rows=rows,
        device=device,
        details={"runs": runs, "gpu_hours": count_hours(rows), "published_steps": PUBLISHED_STEPS},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure with a progress bar, show the table."""
    processes = fsdp.init_process_group()
    with processes.in_turn():
        config, is_dry_run = parse(StepsConfig, argv, description=__doc__.splitlines()[0])
    if is_dry_run:
        sys.stdout.write(to_json(config) if processes.is_first else "")
        return
    with TqdmProgress(is_shown=processes.is_first) as progress, explained(LOWER_STEPS):
        record = run(config, progress, processes)
    if record is not None:
        rows = [row for row in record["rows"] if row["what"] == _PART]
        hours = record["details"]["parts"][_PART]["gpu_hours"]
        sys.stdout.write(f"\n{render_table(rows)}\n{render_table(hours) if hours else ''}\n")


if __name__ == "__main__":
    run_command(fsdp.together(main))
