"""What every process of tests/training/test_fsdp.py runs: small trainings, on any number.

torchrun --nproc-per-node 2 tests/process_group_program.py FOLDER NAME,NAME,... [DEVICE]
"""

import dataclasses
import json
import os
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from conftest import make_teacher, make_wan
from safetensors.torch import save_file
from torch import nn

from linvideo_core import artifact
from linvideo_core.distill.config import DistillationConfig, DistillConfig
from linvideo_core.distill.pipeline import distill
from linvideo_core.distill.task import make_student
from linvideo_core.models.attention_sites import blocks
from linvideo_core.models.quantized import place
from linvideo_core.run.callbacks import Callbacks, Stage
from linvideo_core.run.config import override, run_command
from linvideo_core.run.context import Run
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.training import fsdp
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer import command
from linvideo_core.transfer.config import (
    ObjectiveConfig,
    SelectionConfig,
    SensitivityConfig,
    StudentConfig,
    TransferConfig,
    WarmStartConfig,
)
from linvideo_core.transfer.pipeline import linearize
from linvideo_core.transfer.student import Student

STOP_AT = 2
TRANSFER = TransferConfig(
    trajectories=TrajectoryConfig(
        num_trajectories=5, states_per_trajectory=2, sampler_steps=8, shard_size=2
    ),
    student=StudentConfig(lora_rank=2),
    warm_start=WarmStartConfig(warm_start_steps=3),
    selection=SelectionConfig(target=1, selection_share=0.6),
    objective=ObjectiveConfig(objective="adm"),
    training=TrainingConfig(
        steps=6, batch_size=4, warmup_steps=2, checkpoint_every=100, log_every=1, ema_decay=0.9
    ),
)


def make_frozen_teacher(device: str = "cpu", frozen: str = "fp32") -> Teacher:
    """frozen: of the blocks' matrices alone; all else stays in fp32, so that sums hardly differ."""
    model = make_wan(num_layers=2)
    for name, parameter in list(model.named_parameters()):
        if name.startswith("blocks.") and parameter.ndim == 2:
            place(model, name, parameter.detach(), frozen)
    return make_teacher(model).to(device)


def transfer(
    folder: Path,
    processes: ProcessGroup,
    device: str = "cpu",
    *,
    callbacks: Callbacks | None = None,
    config: TransferConfig = TRANSFER,
    frozen: str = "fp32",
    more_shapes: tuple[tuple[int, int, int, int], ...] = (),
) -> None:
    """Linearize, and leave the student's whole weights beside the artifact."""
    run = make_run(folder, processes, device, callbacks)
    teacher = make_frozen_teacher(run.device, frozen)
    teacher = dataclasses.replace(teacher, more_shapes=more_shapes)
    with Student(teacher, config.student, seed=0) as student:
        linearize(student, teacher, config, run)
        if processes.is_first:
            save_file(dict(student.model.state_dict()), folder / "student.safetensors")
    if processes.is_first:
        save_file(dict(teacher.model.state_dict()), folder / "teacher.safetensors")


def make_run(
    folder: Path, processes: ProcessGroup, device: str, callbacks: Callbacks | None = None
) -> Run:
    callbacks, device = callbacks or Callbacks(), processes.place(device)
    return Run(folder=folder, device=device, processes=processes, callbacks=callbacks)


def retrained(config: TransferConfig = TRANSFER, **training: Any) -> TransferConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def transfer_pool(folder: Path, processes: ProcessGroup, device: str = "cpu", **how: Any) -> None:
    """Learn from videos in flight, of two sizes, half of which the student moves."""
    config = override(TRANSFER, {"states": "pool", "pool_videos": 8, "levels": "even"})
    transfer(folder, processes, device, config=config, more_shapes=((4, 1, 4, 4),), **how)


def transfer_long(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Transfer in many steps, with many checkpoints."""
    rates = {"learning_rate": 1e-4, "map_learning_rate": 1e-4}
    config = retrained(steps=16, checkpoint_every=4, **rates)
    transfer(folder, processes, device, config=config)


def transfer_rounded(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Transfer beside frozen weights in fp8, recomputing activations."""
    config = retrained(activation_checkpointing=True)
    transfer(folder, processes, device, config=config, frozen="fp8")


def transfer_all_weights(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Train a copy of all weights, recomputing activations."""
    config = dataclasses.replace(TRANSFER, student=StudentConfig(parameters="full"))
    config = retrained(config, steps=4, activation_checkpointing=True)
    transfer(folder, processes, device, config=config)


def transfer_by_ranking(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Choose the layers by their sensitivity, in several passes and with accumulation."""
    config = dataclasses.replace(
        TRANSFER,
        selection=SelectionConfig(target=1, choice="sensitivity"),
        sensitivity=SensitivityConfig(sensitivity_videos=4),
    )
    config = retrained(config, steps=2, accumulation=2)
    transfer(folder, processes, device, config=config)


def distil(folder: Path, processes: ProcessGroup, device: str = "cpu", **training: Any) -> None:
    """Distil to two steps, with motion held."""
    run = make_run(folder, processes, device)
    teacher = make_frozen_teacher(run.device)
    config = DistillConfig(
        trajectories=TRANSFER.trajectories,
        distillation=DistillationConfig(
            num_steps=2, lora_rank=2, critic_steps=2, motion_weight=0.1
        ),
        training=retrained(steps=4, **training).training,
    )
    with Student(teacher, StudentConfig(lora_rank=2), seed=3) as student:
        student.harden([1])
        settings = {"parameters": "lora", "objective": "adm", "steps": 1, "provenance": {}}
        first = artifact.extract(student.model, teacher.model, **settings)
    with make_student(teacher, first, config.distillation, seed=0) as student:
        distill(student, teacher, first, config, run)


def distil_one_video_each(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Distil with one video a process of two, where one leaves the sampler before the other.

    Activations are recomputed: the student's and the critic's, in one model.
    """
    distil(folder, processes, device, batch_size=2, activation_checkpointing=True)


def share_one_copy(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Shard a student, and look at what a process holds of it."""
    teacher = make_frozen_teacher(processes.place(device))
    student = Student(teacher, StudentConfig(lora_rank=2), seed=0)
    whole = count_values(student.model)
    original = weakref.ref(teacher.model.blocks[0].ffn[0].weight)
    with processes.sharded({student.model: blocks(student.model, student.sites)}):
        assert original() is None
        part = count_values(student.model)
    assert teacher.model.blocks[0].ffn[0].weight.shape == (96, 128)
    assert count_values(student.model) == whole
    if processes.is_first:
        folder.mkdir()
        (folder / "shares.json").write_text(json.dumps([whole, part]))


def count_values(model: nn.Module) -> int:
    """Return how many values of a model's parameters this process holds."""
    return sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())


class StopOne(Callbacks):
    """Asks this process to stop after some steps of training."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        self.stage = stage

    def on_step_end(self, done: int, **metrics: float) -> None:
        if self.stage == "training" and done == STOP_AT:
            if self.rank == 0:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


def stop_transfer(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Begin a transfer from a pool that its last process is asked to stop."""
    is_last = processes.rank == processes.size - 1
    callbacks = StopOne(processes.rank) if is_last else None
    try:
        transfer_pool(folder, processes, device, callbacks=callbacks)
    except KeyboardInterrupt:
        return
    raise AssertionError("the transfer was not stopped")


def refuse(folder: Path, processes: ProcessGroup, device: str = "cpu") -> None:
    """Ask for what no two processes can share, which ends them."""
    values = {"batch_size": 3, "out": folder, "device": device}
    command.run(override(TransferConfig(), values), processes=processes)


TRANSFERS = (
    transfer,
    transfer_pool,
    transfer_long,
    transfer_rounded,
    transfer_all_weights,
    transfer_by_ranking,
)
OTHERS = (distil, distil_one_video_each, share_one_copy, stop_transfer, refuse)
SCENARIOS: dict[str, Callable[..., None]] = {run.__name__: run for run in (*TRANSFERS, *OTHERS)}


def main(processes: ProcessGroup) -> None:
    """Run the scenarios that are named, each in a folder of its name or of another, `NAME=TO`."""
    torch.set_num_threads(1)
    folder, jobs, *device = sys.argv[1:]
    for job in jobs.split(","):
        name, _, to = job.partition("=")
        SCENARIOS[name](Path(folder) / (to or name), processes, *device)
    processes.destroy()


if __name__ == "__main__":
    run_command(lambda: fsdp.run_together(main))
