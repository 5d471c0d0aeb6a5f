"""What a run is said to take: measured calls times how many there are, and what the disk has."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linvideo_core.evaluate.compare import compare, swap
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.sampler import count_comparing_calls
from linvideo_core.run.config import override
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import count_bytes
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import TransferConfig
from linvideo_core.transfer.estimate import (
    Estimate,
    Pace,
    count_checkpoint_bytes,
    count_timed,
    estimate,
    forecast,
    time_run,
    time_teacher,
)
from linvideo_core.transfer.preflight import Footprint
from linvideo_core.transfer.student import Student
from linvideo_core.transfer.warm_start import feature_maps
from tests.conftest import Recorder, make_teacher, make_wan, save_inputs, small_transfer

PACE = Pace(call=2.0, selecting=30.0, hardened=20.0)


def config_of(**changes: Any) -> TransferConfig:
    values = {
        "num_trajectories": 10,
        "sampler_steps": 50,
        "warm_start_steps": 0,
        "steps": 100,
        "selection_share": 0.3,
        "batch_size": 4,
        "evaluate_samples": 0,
        **changes,
    }
    return override(TransferConfig(), values)


def told(config: TransferConfig, **changes: Any) -> Estimate:
    return estimate(config, PACE, **{"num_missing": 10, "disk_bytes": 10**9, **changes})


def test_each_stage_takes_its_calls() -> None:
    found = told(config_of())
    assert found.sampling == 10 * 50 * 2
    assert found.training == 30 * 30 + 70 * 20
    assert found.warm_start == found.comparing == 0
    assert told(config_of(), num_missing=0).sampling == 0
    assert told(config_of(accumulation=3)).training == 3 * found.training
    assert told(config_of(choice="alternate")).training == 100 * 20
    assert told(config_of(), num_students=2).training == 2 * found.training
    # Three models: videos, a first call, features of half a call; two: ten noise levels. Seven
    # times six calls are timed.
    compared = told(config_of(evaluate_samples=2, evaluate_batch_size=1)).comparing
    assert compared == 2 * (3 * (2 * 50 + 1 + 2 * 0.5) + 2 * 10 + 7 * 6)
    begun = told(config_of(warm_start_steps=9), num_done=10)
    assert begun.training == 20 * 30 + 70 * 20 and begun.warm_start == 0
    assert told(config_of(), num_done=60).training == 40 * 20
    one, ten = (told(config_of(warm_start_steps=n)).warm_start for n in (1, 10))
    assert 0 < one < 4 * 2 and ten == pytest.approx(10 * one)
    four = told(config_of(warm_start_steps=10), num_processes=4)
    assert four.sampling == 3 * 50 * 2 and four.warm_start == pytest.approx(ten / 4)


def test_a_step_that_was_not_tried_is_counted_in_calls() -> None:
    pace, plain = (Pace.from_call(0.5, 2, objective) for objective in ("adm", "velocity"))
    # Wan 1.3B on an H100: a call takes 0.505 s, a pass of two videos that move 8.8 s and 6.1 s.
    assert pace.selecting == pytest.approx(8.8, rel=0.1)
    assert pace.hardened == pytest.approx(6.1, rel=0.1)
    assert plain.selecting < pace.selecting and plain.hardened < pace.hardened


def test_the_sentence_says_hours_and_sizes_in_units_that_can_be_read() -> None:
    values = {"sampling": 3960.0, "warm_start": 360.0, "training": 4320.0, "comparing": 0.0}
    found = Estimate(**values, disk_bytes=3 * 10**9, device_bytes=17 * 10**9)
    assert found.sentence(80 * 10**9) == (
        "about 2.4 hours (1.1 sampling the teacher, 1.3 training); 17.0 GB of the GPU, which has "
        "80.0 GB, 3.0 GB of disk"
    )
    short = dataclasses.replace(found, sampling=0.0, training=60.0, comparing=30.0)
    short = dataclasses.replace(short, device_bytes=None, memory_bytes=2 * 10**9)
    assert short.sentence() == (
        "about 7.5 minutes (7.0 training, 0.5 comparing); 2.0 GB of memory, 3.0 GB of disk"
    )


def count_trained(teacher: Teacher, config: TransferConfig) -> int:
    """Return how many numbers a training of all layers moves, a score a layer among them."""
    with Student(teacher, config.student, seed=0) as student:
        parts = [*student.weights.values(), *feature_maps(student.mixed).values()]
        return sum(p.numel() for p in parts) + len(student.mixed)


def test_calls_and_passes_are_measured_and_leave_the_teacher_as_it_was(
    teacher: Teacher, tmp_path: Path
) -> None:
    config = config_of(target=1, lora_rank=2, out=tmp_path, shard_size=3)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    sizes: list[int] = []
    hook = teacher.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert time_teacher(teacher, config.trajectories, "fp32") > 0
    hook.remove()
    assert set(sizes) == {2 * 3}
    pace = time_run(teacher, config, precision="fp32")
    assert min(pace.call, pace.selecting, pace.hardened) > 0
    assert pace.num_trained == count_trained(teacher, config)
    after = teacher.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("factor", "found"), [(0.0, "0 everywhere"), (1e20, "NaN or infinite")])
def test_weights_of_no_model_are_named_before_anything_long(
    factor: float, found: str, tmp_path: Path
) -> None:
    weights = {name: factor * tensor for name, tensor in make_wan().state_dict().items()}
    model = make_wan()
    model.load_state_dict(weights)
    paths = save_inputs(make_teacher(model), tmp_path)
    with pytest.raises(ValueError, match=f"the velocity of model is {found} at noise") as caught:
        transfer.run(small_transfer(paths["--model"]))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_seconds_are_a_mean_over_the_sizes_of_a_pools_videos(
    teacher: Teacher, tmp_path: Path
) -> None:
    several = dataclasses.replace(teacher, more_shapes=((4, 3, 6, 4), (4, 1, 4, 4)))
    how = {"states": "pool", "levels": "even", "pool_videos": 4, "out": tmp_path}
    config = config_of(target=1, lora_rank=2, **how)
    shapes: list[torch.Size] = []
    hook = teacher.model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1:]))
    pace = time_run(several, config, precision="fp32")
    hook.remove()
    counts = [shapes.count(torch.Size(shape)) for shape in several.latent_shapes]
    assert counts[0] == counts[1] == counts[2] > 0 and sum(counts) == len(shapes)
    assert pace.num_trained == count_trained(teacher, config)
    mixed = dataclasses.replace(PACE, main_call=4.0)
    found = estimate(config_of(evaluate_samples=2), mixed, num_missing=10, disk_bytes=0)
    assert found.sampling == 10 * 50 * 2
    assert found.comparing == 2 * told(config_of(evaluate_samples=2)).comparing


@pytest.mark.parametrize("size", [2, 5])
def test_a_comparison_takes_the_calls_that_are_counted(teacher: Teacher, size: int) -> None:
    settings = CompareConfig(num_samples=3, batch_size=size, sampler_steps=4)
    branches: list[int] = []
    hook = teacher.model.register_forward_pre_hook(lambda _, args: branches.append(len(args[0])))
    compare(teacher, {"swapped": swap(teacher.model, [0], 16)}, settings, seed=0)
    hook.remove()
    assert sum(branches) == 2 * count_comparing_calls(3, size, 4, num_students=1)


def test_a_disk_that_holds_samples_or_checkpoints_but_not_both_is_refused(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(target=1, out=tmp_path / "runs" / "a")
    samples = count_bytes(config.trajectories, teacher.latent_shape)
    footprint = Footprint(num_trained=10**6, memory_bytes=0, device_bytes=None)
    settings = {"precision": "fp32", "footprint": footprint}
    needed = samples + count_checkpoint_bytes(10**6)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert forecast(teacher, config, PACE, **settings).disk_bytes == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"samples and the checkpoints take .*: free") as caught:
        forecast(teacher, config, PACE, **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_checkpoints_take_no_more_than_they_were_said_to(teacher: Teacher, tmp_path: Path) -> None:
    config = small_transfer(save_inputs(teacher, tmp_path)["--model"], out=tmp_path / "run")
    transfer.run(config)
    at_most = count_checkpoint_bytes(count_trained(teacher, config))
    found = (config.out / "training" / "checkpoint.safetensors").stat().st_size
    assert 2 * found < at_most + 2**17


def test_the_command_says_what_it_takes_before_the_teacher_is_sampled(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_transfer(save_inputs(teacher, tmp_path)["--model"], out=tmp_path / "run")
    recorder = Recorder(stop_at=("sampling_teacher", 0))
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        transfer.run(config, recorder)
    said = [text for text in caplog.messages if "this run takes" in text]
    assert len(said) == 2 and said[0].startswith("timing a few calls")
    assert said[1].startswith("this run takes about")
    assert recorder.seen == [("sampling_teacher", 0)]


def test_on_a_cpu_calls_of_few_videos_are_timed() -> None:
    config = config_of(num_trajectories=256, shard_size=256).trajectories
    counts = [count_timed(config, torch.device(name)) for name in ("cpu", "cuda")]
    assert counts == [4, 256]


def test_last_words_name_what_is_stored(teacher: Teacher, tmp_path: Path) -> None:
    out, samples = tmp_path / "a" / "run", tmp_path / "a" / "teacher"
    config = small_transfer(save_inputs(teacher, tmp_path)["--model"], out=out)
    assert transfer.describe_kept(config).startswith("nothing was stored yet")
    said = []
    for moment in (("sampling_teacher", 0), ("warm_start", 0), ("training", 2)):
        with pytest.raises(KeyboardInterrupt):
            transfer.run(config, Recorder(stop_at=moment))
        said.append(transfer.describe_kept(config))
    assert said[0].startswith("nothing was stored yet")
    assert said[1] == f"the same command continues with the teacher's videos in {samples}"
    assert said[2] == "the same command continues from the last checkpoint"
    other = dataclasses.replace(config, out=tmp_path / "a" / "other")
    assert transfer.describe_kept(other).startswith("nothing was stored yet")


def test_memory_that_is_too_small_for_a_step_is_found_before_the_teacher_is_sampled(
    teacher: Teacher, tmp_path: Path
) -> None:
    config = config_of(target=1, out=tmp_path / "run")

    def fail(module: object, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    teacher.model.blocks[0].register_forward_pre_hook(fail)
    time_teacher(teacher, config.trajectories, "fp32")
    with pytest.raises(torch.OutOfMemoryError):
        time_run(teacher, config, precision="fp32")
    assert not (tmp_path / "run").exists() and not (tmp_path / "teacher").exists()
