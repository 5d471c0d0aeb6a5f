"""The warm start fits feature maps to softmax attention and touches nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import fit, seed_step
from linvideo_core.transfer.config import ObjectiveConfig, StudentConfig, WarmStartConfig
from linvideo_core.transfer.objective import Batches
from linvideo_core.transfer.student import Student
from linvideo_core.transfer.warm_start import WarmStart, feature_maps, fit_feature_maps

SETTINGS = TrainingConfig(steps=30, batch_size=3, warmup_steps=2, log_every=1, checkpoint_every=10)
OBJECTIVE = ObjectiveConfig(objective="velocity", levels="even", prompt_dropout=0.3)


def make_task(
    teacher: Teacher, folder: Path, parameters: str = "full", precision: str = "fp32"
) -> WarmStart:
    settings = TrajectoryConfig(
        num_trajectories=3, states_per_trajectory=2, sampler_steps=5, shard_size=3
    )
    batches = Batches(teacher, collect(teacher, settings, Run(folder=folder)), OBJECTIVE, 3)
    student = Student(teacher, StudentConfig(parameters=parameters, lora_rank=4), seed=0)
    run = Run(precision=precision)
    return WarmStart(student.model, student.mixed, batches, learning_rate=1e-2, run=run)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_the_loss_falls_and_only_the_maps_move(
    parameters: str, teacher: Teacher, tmp_path: Path
) -> None:
    task = make_task(teacher, tmp_path / "trajectories", parameters)
    before = snapshot(task.model)
    fit(task, SETTINGS, Run(folder=tmp_path / "warm_start"))
    rows = (tmp_path / "warm_start" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, tensor in snapshot(task.model).items():
        is_map = name.endswith(("query_map", "key_map"))
        assert torch.equal(tensor, before[name]) != is_map, name


def test_the_loss_is_the_relative_error_of_each_layer(teacher: Teacher, tmp_path: Path) -> None:
    task = make_task(teacher, tmp_path)
    seen: list[float] = []

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        linear, softmax = module.linear(*args), module.softmax(*args)
        seen.append(float((linear - softmax).square().sum() / softmax.square().sum()))

    for module in task.mixed.values():
        module.register_forward_hook(compare)
    loss, metrics = task.loss(0, seed_step(0, 0))
    assert metrics["layer_errors"].tolist() == pytest.approx(seen, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(sum(seen) / 3, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_taken_layer_by_layer_are_those_of_the_loss_as_a_whole(
    precision: str, teacher: Teacher, tmp_path: Path
) -> None:
    task = make_task(teacher, tmp_path, precision=precision)
    errors: list[Tensor] = []
    sizes: list[Tensor] = []

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.enable_grad():
            linear = module.linear(*(x.detach() for x in args)).float()
            target = output.detach().float()
            errors.append((linear - target).square().mean())
            sizes.append(target.square().mean())

    hooks = [module.register_forward_hook(compare) for module in task.mixed.values()]
    loss, metrics = task.loss(0, seed_step(0, 0))
    for hook in hooks:
        hook.remove()
    (loss / 2).backward()
    found = {name: parameter.grad for name, parameter in feature_maps(task.mixed).items()}

    task.model.zero_grad()
    layer_errors = torch.stack(errors) / torch.stack(sizes)
    whole = layer_errors.mean()
    (whole / 2).backward()
    assert torch.equal(loss, whole) and torch.equal(metrics["layer_errors"], layer_errors)
    for name, parameter in feature_maps(task.mixed).items():
        assert parameter.grad.abs().sum() > 0
        assert torch.equal(found[name], parameter.grad), name


def test_a_model_that_takes_one_video_a_call_learns_from_all_of_a_batch(
    teacher: Teacher, tmp_path: Path
) -> None:
    task = make_task(teacher, tmp_path)
    errors: dict[nn.Module, list[Tensor]] = {module: [] for module in task.mixed.values()}

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.enable_grad():
            linear = module.linear(*(x.detach() for x in args))
            error = (linear - output.detach()).square().mean() / output.detach().square().mean()
            errors[module].append(error)

    def run_one_by_one(*batch: Tensor) -> Tensor:
        rows = zip(*(x.split(1) for x in batch), strict=True)
        return torch.cat([type(task.model).forward(task.model, *row) for row in rows])

    task.model.forward = run_one_by_one
    hooks = [module.register_forward_hook(compare) for module in task.mixed.values()]
    loss, _ = task.loss(0, seed_step(0, 0))
    for hook in hooks:
        hook.remove()
    loss.backward()
    found = {name: parameter.grad for name, parameter in feature_maps(task.mixed).items()}
    task.model.zero_grad()
    assert all(len(each) == 3 for each in errors.values())
    whole = torch.stack([torch.stack(each).mean() for each in errors.values()]).mean()
    whole.backward()
    torch.testing.assert_close(loss, whole)
    for name, parameter in feature_maps(task.mixed).items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_switches_and_modes_are_restored_also_after_a_failure(
    teacher: Teacher, tmp_path: Path
) -> None:
    task = make_task(teacher, tmp_path / "run")
    modes = ("linear", "mixed", "softmax")
    for module, mode in zip(task.mixed.values(), modes, strict=True):
        module.mode = mode
    loss, metrics = task.loss(0, seed_step(0, 0))
    assert loss.requires_grad and metrics["layer_errors"].shape == (3,)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    task.model.blocks[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        task.loss(0, seed_step(0, 0))
    assert tuple(module.mode for module in task.mixed.values()) == modes
    assert all(module.enabled for module in task.mixed.values())
    assert not any(module._forward_hooks for module in task.mixed.values())


def test_layers_are_fitted_independently(teacher: Teacher, tmp_path: Path) -> None:
    task = make_task(teacher, tmp_path)
    _, before = task.loss(0, seed_step(0, 0))
    with torch.no_grad():
        task.mixed[0].linear.query_map.mul_(-3)
    _, after = task.loss(0, seed_step(0, 0))
    assert after["layer_errors"][0] != before["layer_errors"][0]
    assert torch.equal(after["layer_errors"][1:], before["layer_errors"][1:])


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_the_learning_rate_rises_in_a_tenth_of_its_own_steps_whatever_the_trainings_does(
    warmup_steps: int, teacher: Teacher, tmp_path: Path
) -> None:
    task = make_task(teacher, tmp_path / "trajectories")
    fit_feature_maps(
        task.model,
        task.mixed,
        teacher,
        task.batches.trajectories,
        WarmStartConfig(warm_start_steps=20),
        dataclasses.replace(SETTINGS, steps=1000, warmup_steps=warmup_steps),
        Run(folder=tmp_path / "warm_start"),
        prompt_dropout=0.3,
    )
    rows = (tmp_path / "warm_start" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(row)["learning_rate_share"] for row in rows]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[3:] == sorted(shares[3:], reverse=True) and 0 < shares[-1] < 0.01


def test_the_maps_of_all_layers_have_unique_names(teacher: Teacher, tmp_path: Path) -> None:
    task = make_task(teacher, tmp_path)
    maps = feature_maps(task.mixed)
    assert len(maps) == 6
    assert {id(p) for p in maps.values()} == {
        id(p) for m in task.mixed.values() for p in m.linear.parameters()
    }


@pytest.mark.parametrize("options", [{"warm_start_steps": -1}, {"warm_start_learning_rate": 0.0}])
def test_impossible_settings_are_refused_by_flag(options: dict[str, float]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        WarmStartConfig(**options)
