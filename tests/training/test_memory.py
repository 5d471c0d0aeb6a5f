"""What a training step has in memory at its peak, as PyTorch's CPU allocator gives it out."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from linvideo_core.distill.config import DistillationConfig
from linvideo_core.distill.task import DistillationTask
from linvideo_core.distill.teacher_statistics import Endpoints, TeacherStatistics
from linvideo_core.flow import bind
from linvideo_core.models.attention_sites import checkpoint_activations
from linvideo_core.models.config import LinearForm
from linvideo_core.models.quantized import place
from linvideo_core.run.context import Run
from linvideo_core.run.memory import Transformer, training_needs
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import seed_step
from linvideo_core.transfer.config import ObjectiveConfig, SelectionConfig, StudentConfig
from linvideo_core.transfer.objective import Batches
from linvideo_core.transfer.student import Student, TransferTask
from linvideo_core.transfer.warm_start import WarmStart
from tests.allocations import peak_bytes
from tests.conftest import TEXT_DIM, make_teacher, make_wan

NUM_LAYERS, DIM = 3, 128
# Small, but so that activations are far larger than the weights of a block.
SHAPE, NUM_TOKENS = (4, 4, 24, 24), 4 * 12 * 12
NARROW = 2  # Bytes of a number in bf16.


def make_large(num_layers: int = NUM_LAYERS, frozen: str = "fp32") -> Teacher:
    model = make_wan(num_layers=num_layers)
    for name, parameter in list(model.named_parameters()):
        place(model, name, parameter.detach(), frozen)
    return dataclasses.replace(make_teacher(model), latent_shape=SHAPE)


def sample(teacher: Teacher, folder: Path) -> Trajectories:
    settings = TrajectoryConfig(
        num_trajectories=1, states_per_trajectory=1, sampler_steps=1, guidance_scale=2.0
    )
    return collect(teacher, settings, Run(folder=folder / "run"))


def peak_of_step(task: TransferTask | WarmStart) -> int:
    return peak_bytes(lambda: task.loss(0, seed_step(0, 0))[0].backward())


def peak_of_call(
    teacher: Teacher, mode: str, *, is_checkpointed: bool, tile: str | None = None
) -> int:
    """Return the peak of a call in bf16 and its way back, all layers of one kind."""
    config = StudentConfig(lora_rank=2, form=LinearForm(tile=tile))
    with Student(teacher, config, seed=0) as student:
        for module in student.mixed.values():
            module.mode = mode
        if is_checkpointed:
            checkpoint_activations(student.model, student.sites)
        velocity_fn = bind(student.model, torch.randn(1, 5, TEXT_DIM), precision="bf16")
        latents, sigma = torch.randn(1, *SHAPE), torch.tensor([0.5])
        return peak_bytes(lambda: velocity_fn(latents, sigma).square().mean().backward())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_passes_before_the_one_that_learns_leave_nothing_behind(
    is_checkpointed: bool, tmp_path: Path
) -> None:
    """`adm` asks the student by both branches and the teacher first; `velocity` asks nobody."""
    large, peaks = make_large(), {}
    trajectories = sample(large, tmp_path)
    for objective in ("velocity", "adm"):
        with Student(large, StudentConfig(lora_rank=2), seed=0) as student:
            task = TransferTask(
                student,
                large,
                trajectories,
                selection=SelectionConfig(target=1),
                objective=ObjectiveConfig(objective=objective),
                training=TrainingConfig(batch_size=1, activation_checkpointing=is_checkpointed),
                run=Run(precision="bf16"),
            )
            peaks[objective] = peak_of_step(task)
    assert peaks["adm"] <= 1.01 * peaks["velocity"]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_distillation_keeps_one_pass_of_one_network_however_many_videos_a_step_has(
    is_checkpointed: bool, tmp_path: Path
) -> None:
    large, peaks = make_large(), {}
    endpoints = Endpoints(sample(large, tmp_path), 0.5)
    with Student(large, StudentConfig(lora_rank=2), seed=0) as student:
        student.harden([0])
        training = TrainingConfig(batch_size=1, activation_checkpointing=is_checkpointed)
        task = DistillationTask(
            student,
            large,
            TeacherStatistics(spread=1.0, motion=1.0),
            DistillationConfig(num_steps=2, motion_weight=0.1),
            training=training,
            shift=3.0,
            run=Run(precision="bf16"),
            endpoints=endpoints,
        )

        def take_step(num_videos: int) -> None:
            for loss, _ in task.losses(0, seed_step(0, 0), num_videos):
                loss.backward()

        take_step(2)
        peaks = {n: peak_bytes(lambda n=n: take_step(n)) for n in (2, 4)}
        task.remove_critic()
    # What a video keeps beside its passes: noises and latents of all steps.
    of_video = 8 * math.prod(SHAPE) * 4
    assert peaks[4] <= peaks[2] + 2 * of_video
    pass_bytes = peak_of_call(large, "softmax", is_checkpointed=is_checkpointed)
    assert peaks[2] <= 1.05 * pass_bytes + 2 * of_video


@pytest.mark.parametrize("frozen", ["fp32", "fp8"])
def test_the_warm_start_keeps_one_layer_and_needs_no_more_than_a_recomputed_step(
    frozen: str, tmp_path: Path
) -> None:
    """The maps' gradients alone grow with the layers."""
    peaks = {}
    for num_layers in (2, NUM_LAYERS):
        teacher = make_large(num_layers, frozen)
        trajectories = sample(teacher, tmp_path / str(num_layers))
        with Student(teacher, StudentConfig(lora_rank=2), seed=0) as student:
            batches = Batches(teacher, trajectories, ObjectiveConfig(objective="velocity"), 1)
            run = Run(precision="bf16")
            task = WarmStart(student.model, student.mixed, batches, learning_rate=1e-2, run=run)
            peaks[num_layers] = peak_of_step(task)
    gradients = (NUM_LAYERS - 2) * 2 * DIM * DIM // 2 * 4
    assert peaks[NUM_LAYERS] <= peaks[2] + gradients + NUM_TOKENS * DIM
    assert peaks[NUM_LAYERS] <= peak_of_call(teacher, "mixed", is_checkpointed=True)


@pytest.mark.parametrize(("frozen", "tile"), [("fp32", None), ("fp8", None), ("fp32", "1x3x3")])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_peak_of_a_step_is_what_it_was_told_to_twice_that_and_mixing_keeps_two_outputs(
    frozen: str, tile: str | None, is_checkpointed: bool
) -> None:
    """Recomputed, the outputs of one layer at a time; of hybrid layers half as much again."""
    large = make_large(frozen=frozen)
    sizes = {name: getattr(large.model.config, name) for name in ("dim", "ffn_dim", "num_layers")}
    stream_bytes = 4 if frozen == "fp32" else 2
    needs = training_needs(
        Transformer(**sizes, num_tokens=NUM_TOKENS, stream_bytes=stream_bytes),
        weight_bytes=0,
        num_trained=0,
        batch_size=1,
        sampled_together=0,
        is_checkpointed=is_checkpointed,
        precision="bf16",
    )
    told = sum(need.num_bytes for need in needs)
    mixed = peak_of_call(large, "mixed", is_checkpointed=is_checkpointed, tile=tile)
    assert told <= mixed <= (3 if tile else 2) * told
    if frozen == "fp32" and tile is None:
        alone = peak_of_call(large, "softmax", is_checkpointed=is_checkpointed)
        num_keeping = 1 if is_checkpointed else NUM_LAYERS
        assert alone < mixed <= alone + 2.5 * 2 * num_keeping * NUM_TOKENS * DIM * NARROW
