"""The warm start fits feature maps to softmax attention and touches nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.run.context import Run
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import fit, seed_step
from linvideo_core.transfer.config import ObjectiveConfig, StudentConfig, WarmStartConfig
from linvideo_core.transfer.objective import Batches
from linvideo_core.transfer.student import Student
from linvideo_core.transfer.warm_start import WarmStart, feature_maps, fit_feature_maps

SETTINGS = TrainingConfig(steps=30, batch_size=3, warmup_steps=2, log_every=1, checkpoint_every=10)
OBJECTIVE = ObjectiveConfig(objective="velocity", levels="even", prompt_dropout=0.3)


def make_task(
    teacher: Teacher,
    trajectories: Trajectories,
    parameters: str = "full",
    precision: str = "fp32",
) -> WarmStart:
    batches = Batches(teacher, trajectories, OBJECTIVE, 3)
    student = Student(teacher, StudentConfig(parameters=parameters, lora_rank=4), seed=0)
    run = Run(precision=precision)
    return WarmStart(student.model, student.mixed, batches, learning_rate=1e-2, run=run)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_the_loss_falls_and_only_the_maps_move(
    parameters: str, teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    task = make_task(teacher, trajectories, parameters)
    before = snapshot(task.model)
    fit(task, SETTINGS, Run(folder=tmp_path / "warm_start"))
    rows = (tmp_path / "warm_start" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, tensor in snapshot(task.model).items():
        is_map = name.endswith(("query_map", "key_map"))
        assert torch.equal(tensor, before[name]) != is_map, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_one_by_one", [False, True])
def test_gradients_taken_layer_by_layer_are_those_of_the_mean_relative_error(
    precision: str, is_one_by_one: bool, teacher: Teacher, trajectories: Trajectories
) -> None:
    """Also of a model that takes one video a call, which calls each layer for every video."""
    task = make_task(teacher, trajectories, precision=precision)
    errors: dict[nn.Module, list[Tensor]] = {module: [] for module in task.mixed.values()}

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.enable_grad():
            linear = module.linear(*(x.detach() for x in args[:3])).float()
            target = output.detach().float()
            error = (linear - target).square().mean() / target.square().mean()
            errors[module].append(error)

    def run_one_by_one(*batch: Tensor) -> Tensor:
        rows = zip(*(x.split(1) for x in batch), strict=True)
        return torch.cat([type(task.model).forward(task.model, *row) for row in rows])

    if is_one_by_one:
        task.model.forward = run_one_by_one
    hooks = [module.register_forward_hook(compare) for module in task.mixed.values()]
    loss, metrics = task.loss(0, seed_step(0, 0))
    for hook in hooks:
        hook.remove()
    (loss / 2).backward()
    maps = feature_maps(task.mixed)
    found = {name: parameter.grad for name, parameter in maps.items()}
    task.model.zero_grad()
    assert len(maps) == 6 and {len(each) for each in errors.values()} == {3 if is_one_by_one else 1}
    layer_errors = torch.stack([torch.stack(each).mean() for each in errors.values()])
    whole = layer_errors.mean()
    (whole / 2).backward()
    assert torch.equal(loss, whole) and torch.equal(metrics["layer_errors"], layer_errors)
    exact = {} if is_one_by_one else {"rtol": 0, "atol": 0}
    for name, parameter in maps.items():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(found[name], parameter.grad, **exact)


def test_switches_and_modes_are_restored_also_after_a_failure(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories)
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


def test_layers_are_fitted_independently(teacher: Teacher, trajectories: Trajectories) -> None:
    task = make_task(teacher, trajectories)
    _, before = task.loss(0, seed_step(0, 0))
    with torch.no_grad():
        task.mixed[0].linear.query_map.mul_(-3)
    _, after = task.loss(0, seed_step(0, 0))
    assert after["layer_errors"][0] != before["layer_errors"][0]
    assert torch.equal(after["layer_errors"][1:], before["layer_errors"][1:])


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_the_learning_rate_rises_in_a_tenth_of_its_own_steps_whatever_the_trainings_does(
    warmup_steps: int, teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    task = make_task(teacher, trajectories)
    fit_feature_maps(
        task.model,
        task.mixed,
        teacher,
        trajectories,
        WarmStartConfig(warm_start_steps=20),
        dataclasses.replace(SETTINGS, steps=1000, warmup_steps=warmup_steps),
        Run(folder=tmp_path / "warm_start"),
        prompt_dropout=0.3,
    )
    rows = (tmp_path / "warm_start" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(row)["learning_rate_share"] for row in rows]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[3:] == sorted(shares[3:], reverse=True) and 0 < shares[-1] < 0.01
