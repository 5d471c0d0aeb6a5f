"""The student is the teacher until it is trained, and moves only where it may."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from linvideo_core.models.attention_sites import compiled_blocks
from linvideo_core.models.config import LinearForm
from linvideo_core.run.context import Run
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import fit, seed_step
from linvideo_core.transfer.config import (
    OBJECTIVES,
    PARAMETERS,
    ObjectiveConfig,
    SelectionConfig,
    StudentConfig,
)
from linvideo_core.transfer.objective import Batch, Batches, level_density
from linvideo_core.transfer.student import Student, TransferTask
from tests.conftest import Recorder

Inputs = tuple[Tensor, Tensor, Tensor]


def make_task(
    teacher: Teacher,
    trajectories: Trajectories,
    *,
    parameters: str = "full",
    objective: str = "adm",
    levels: str = "even",
    **training: float | bool,
) -> TransferTask:
    settings = TrainingConfig(**{"steps": 10, "batch_size": 3, "warmup_steps": 2, **training})
    return TransferTask(
        Student(teacher, StudentConfig(parameters=parameters, lora_rank=4), seed=0),
        teacher,
        trajectories,
        selection=SelectionConfig(target=2),
        objective=ObjectiveConfig(objective=objective, levels=levels),
        training=settings,
        run=Run(),
    )


def parameters_of(task: TransferTask) -> dict[str, Tensor]:
    return {n: p for group in task.parameter_groups() for n, p in group.parameters.items()}


def test_noise_levels_are_drawn_as_configured(teacher: Teacher, trajectories: Trajectories) -> None:
    config = ObjectiveConfig(objective="velocity", levels="flow")
    batch = Batches(teacher, trajectories, config, 3000).draw(seed_step(0, 0))
    density = level_density(trajectories.sigmas, "flow")
    kept = trajectories.steps().unique()
    expected = density[kept] / density[kept].sum()
    shares = batch.step.bincount(minlength=len(density))[kept] / 3000
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_the_student_is_the_teacher_exactly_where_softmax_or_disabled_or_removed(
    parameters: str, teacher: Teacher, inputs: Inputs
) -> None:
    expected = teacher.model(*inputs)
    names = [name for name, _ in teacher.model.named_parameters()]
    settings = StudentConfig(parameters=parameters, lora_rank=4)
    with Student(teacher, settings, seed=0) as student:
        assert (student.model is teacher.model) == (parameters != "full")
        # Layers start mixed at r = 1, which is softmax too.
        assert torch.equal(student.model(*inputs), expected)
        student.harden([])
        assert torch.equal(student.model(*inputs), expected)
        for layer in range(3):
            student.harden([layer])
            assert not torch.allclose(student.model(*inputs), expected)
        for name, weight in student.weights.items():
            if name.endswith("up"):
                torch.nn.init.normal_(weight, std=0.05)
        changed = student.model(*inputs)
        with student.disabled(), student.disabled():
            assert torch.equal(student.model(*inputs), expected)
        with student.disabled(), pytest.raises(ZeroDivisionError), student.disabled():
            raise ZeroDivisionError
        assert torch.equal(student.model(*inputs), changed)
        assert not torch.equal(changed, expected)
    assert torch.equal(teacher.model(*inputs), expected)
    assert [name for name, _ in teacher.model.named_parameters()] == names


def test_a_teacher_has_one_student_at_a_time(teacher: Teacher) -> None:
    with (
        Student(teacher, StudentConfig(lora_rank=4), seed=0),
        pytest.raises(ValueError, match="has a student already: remove that one first"),
    ):
        Student(teacher, StudentConfig(parameters="full"), seed=0)
    Student(teacher, StudentConfig(lora_rank=4), seed=1).remove()


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_only_what_is_declared_requires_a_gradient(
    parameters: str, teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories, parameters=parameters)
    declared = {id(p) for p in parameters_of(task).values()}
    moving = {id(p): n for n, p in task.student.model.named_parameters() if p.requires_grad}
    assert set(moving) == declared
    weights = {n for n in moving.values() if ".attention." not in n}
    expected = {
        "feature_maps": set(),
        "lora": {n for n, _ in task.student.model.named_parameters() if ".lora." in n},
        "full": {n for n, _ in teacher.model.named_parameters() if n.startswith("blocks.")},
    }[parameters]
    assert weights == expected
    assert set(task.student.weights) == weights


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_training_leaves_the_teacher_as_it_was(
    parameters: str, teacher: Teacher, trajectories: Trajectories, inputs: Inputs, tmp_path: Path
) -> None:
    names, before = [n for n, _ in teacher.model.named_parameters()], teacher.model(*inputs)
    task = make_task(
        teacher, trajectories, parameters=parameters, steps=3, activation_checkpointing=True
    )
    fit(task, task.training, Run(folder=tmp_path / "fit"))
    assert not torch.equal(task.student.model(*inputs), before)
    task.student.remove()
    assert torch.equal(teacher.model(*inputs), before)
    assert [n for n, _ in teacher.model.named_parameters()] == names
    assert not any("forward" in vars(module) for module in teacher.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("tile", [None, "1x2x0"])
def test_compiled_blocks_heed_the_switch(
    tile: str | None, teacher: Teacher, inputs: Inputs
) -> None:
    torch._dynamo.reset()
    counters.clear()
    config = StudentConfig(lora_rank=4, form=LinearForm(tile=tile))
    with Student(teacher, config, seed=0) as student, torch.no_grad():
        for name, parameter in student.weights.items():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, std=0.05)
        student.harden([0, 1, 2])

        def run() -> list[Tensor]:
            found = [student.model(*inputs)]
            with student.disabled():
                found.append(teacher.model(*inputs))
            return found

        expected = run()
        with compiled_blocks([student.model], student.sites):
            twice = [run(), run()]
    assert not torch.allclose(*expected, atol=1e-2)
    # Layers of a kind share their code.
    assert counters["stats"]["unique_graphs"] == 2
    for found in twice:
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2])
def test_feature_maps_have_the_declared_width_and_the_seeds_start(
    ratio: int, teacher: Teacher
) -> None:
    maps = []
    for seed in (0, 0, 1):
        with Student(
            teacher, StudentConfig(feature_ratio=ratio, lora_rank=4), seed=seed
        ) as student:
            maps.append([student.mixed[layer].linear for layer in range(3)])
    for first, again, other in zip(*maps, strict=True):
        assert first.feature_dim == 128 * ratio
        assert torch.equal(first.query_map, again.query_map)
        assert not torch.equal(first.query_map, other.query_map)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_every_declared_parameter_is_reached_by_the_loss(
    parameters: str, objective: str, teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories, parameters=parameters, objective=objective)
    names = [name for group in task.parameter_groups() for name in group.parameters]
    assert len(set(names)) == len(names) and all(g.parameters for g in task.parameter_groups())
    loss, metrics = task.loss(0, seed_step(0, 0))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert metrics["layer_scores"].shape == (3,)
    for name, parameter in parameters_of(task).items():
        assert parameter.grad is not None, name
    declared = {id(p) for p in parameters_of(task).values()}
    assert all(p.grad is None for p in teacher.model.parameters() if id(p) not in declared)


def test_the_first_step_of_a_softmax_student_has_nothing_to_learn(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories)
    task.student.harden([])
    _, metrics = task.loss(0, seed_step(0, 0))
    # Velocities are stored in half precision.
    assert float(metrics["objective_loss"]) < 1e-6


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_recomputed_activations_give_equal_gradients(
    parameters: str, teacher: Teacher, trajectories: Trajectories
) -> None:
    gradients = []
    for is_recomputed in (False, True):
        task = make_task(
            teacher, trajectories, parameters=parameters, activation_checkpointing=is_recomputed
        )
        loss, _ = task.loss(0, seed_step(0, 0))
        loss.backward()
        gradients.append({n: p.grad for n, p in parameters_of(task).items()})
        task.student.remove()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0, msg=name)


def test_the_hardened_choice_survives_a_restart(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories, parameters="full")
    assert task.state() == {"linear_layers": None}
    for module, value in zip(task.student.mixed.values(), (0.1, 0.9, 0.2), strict=True):
        module.layer_score.data.fill_(value)
    for step in range(3):
        task.after_step(step)
    assert task.state() == {"linear_layers": (0, 2)}
    restarted = make_task(teacher, trajectories)
    restarted.load_state({"linear_layers": [0, 2]})
    assert restarted.state() == task.state()
    assert float(restarted.selection.loss(4)) == 0
    undecided = make_task(teacher, trajectories)
    undecided.load_state({"linear_layers": None})
    assert undecided.state() == {"linear_layers": None}


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_transfer_interrupted_before_and_after_the_choice_equals_an_unbroken_one(
    parameters: str, teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    def train(folder: Path, moment: int | None = None) -> dict[str, Tensor]:
        task = make_task(teacher, trajectories, parameters=parameters, steps=6, checkpoint_every=1)
        stop_at = None if moment is None else ("training", moment)
        with task.student:
            fit(task, task.training, Run(folder=folder, callbacks=Recorder(stop_at)))
            assert len(task.selection.linear_layers) == 2
            return {n: p.detach().clone() for n, p in parameters_of(task).items()}

    unbroken = train(tmp_path / "unbroken")
    for moment in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", moment)
    broken = train(tmp_path / "broken")
    for name, tensor in unbroken.items():
        assert torch.equal(broken[name], tensor), name


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
def test_a_batch_trains_each_row_in_one_guidance_branch(
    dropout: float, teacher: Teacher, trajectories: Trajectories
) -> None:
    config = ObjectiveConfig(objective="velocity", levels="even", prompt_dropout=dropout)
    batch = Batches(teacher, trajectories, config, 63).draw(seed_step(0, 0))
    states = trajectories.take(trajectories.pick(63, seed_step(0, 0)), "cpu")
    negative = teacher.negative_embeds
    num_dropped = 0
    for i, prompt in enumerate(states.prompt):
        assert torch.equal(batch.prompt_embeds[i], teacher.prompt_embeds[prompt])
        assert torch.equal(batch.negative_embeds[i], negative)
        is_dropped = torch.equal(batch.branch_embeds[i], negative)
        num_dropped += is_dropped
        embeds = negative if is_dropped else teacher.prompt_embeds[prompt]
        assert torch.equal(batch.branch_embeds[i], embeds)
        velocity = states.unconditional[i] if is_dropped else states.conditional[i]
        assert torch.equal(batch.velocity[i], velocity)
    # Four standard deviations of a binomial count, none at the ends.
    slack = 4 * (63 * dropout * (1 - dropout)) ** 0.5
    assert abs(num_dropped - 63 * dropout) <= slack
    assert torch.equal(batch.latents, states.latents)
    assert torch.equal(batch.step, states.step)
    assert batch.is_stored.all() and not batch.any_moves and batch.weight.eq(1).all()


@pytest.mark.parametrize(("share", "num_stored"), [(0.0, 0), (0.5, 6), (1.0, 12)])
def test_rows_that_are_not_stored_move_on_and_count_as_their_level_is_drawn(
    share: float, num_stored: int, teacher: Teacher, trajectories: Trajectories
) -> None:
    objective = ObjectiveConfig(objective="adm", anchor_share=share)
    batches = Batches(teacher, trajectories, objective, 12)
    batch = batches.draw(seed_step(0, 0))
    assert int(batch.is_stored.sum()) == num_stored and batch.any_moves == (num_stored < 12)
    stays, moves = batch.is_stored, ~batch.is_stored
    assert torch.equal(batch.step_to[stays], batch.step[stays])
    is_last = batch.step == len(trajectories.sigmas) - 2
    assert bool(((batch.step_to > batch.step) | is_last)[moves].all())
    assert torch.equal(batch.weight[moves], batches.level_weights[batch.step_to[moves]])
    assert batch.weight[stays].eq(1).all()


@pytest.mark.parametrize("size", [2, 3])
def test_the_processes_rows_make_up_the_batch_of_one(
    size: int, teacher: Teacher, trajectories: Trajectories
) -> None:
    def draw(rank: int, size: int) -> Batch:
        processes = ProcessGroup()
        processes.rank, processes.size = rank, size
        objective = ObjectiveConfig(objective="adm")
        return Batches(teacher, trajectories, objective, 6, processes).draw(seed_step(1, 2))

    whole, parts = draw(0, 1), [draw(rank, size) for rank in range(size)]
    for field in dataclasses.fields(Batch):
        expected = getattr(whole, field.name)
        for rank, part in enumerate(parts):
            found = getattr(part, field.name)
            if field.name == "any_moves":
                assert found == expected
            else:
                assert torch.equal(found, expected[rank::size]), field.name
