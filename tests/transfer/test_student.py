"""The student is the teacher until it is told otherwise, and moves only where it may."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from linvideo_core.transfer.noise_levels import level_density
from linvideo_core.transfer.objectives import OBJECTIVES, ObjectiveConfig
from torch import Tensor

from linvideo_core.models.attention_sites import compiled_blocks
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, TrajectoryConfig, collect
from linvideo_core.training.trainer import TrainingConfig, fit, seed_step
from linvideo_core.transfer.batches import draw_batch
from linvideo_core.transfer.layer_selection.rules import SelectionConfig
from linvideo_core.transfer.student import PARAMETERS, Student, StudentConfig, TransferTask

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def trajectories(teacher: Teacher, tmp_path: Path) -> Trajectories:
    settings = TrajectoryConfig(
        num_trajectories=3,
        states_per_trajectory=2,
        sampler_steps=5,
        guidance_scale=2.0,
        shard_size=3,
    )
    return collect(teacher, settings, tmp_path / "trajectories", seed=0)


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
        precision="fp32",
    )


def parameters_of(task: TransferTask) -> dict[str, Tensor]:
    return {n: p for group in task.parameter_groups() for n, p in group.parameters.items()}


def test_a_task_draws_noise_levels_as_it_is_told(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    assert make_task(teacher, trajectories, levels="even").weights is None
    weights = make_task(teacher, trajectories, levels="flow").weights
    drawn = draw_batch(teacher, trajectories, 3000, 0.0, seed_step(0, 0), weights=weights)
    density = level_density(trajectories.sigmas, "flow")
    kept = trajectories.steps().unique()
    expected = density[kept] / density[kept].sum()
    shares = drawn.batch.step.bincount(minlength=len(density))[kept] / 3000
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_the_student_equals_the_teacher_exactly_where_every_layer_is_softmax(
    parameters: str, teacher: Teacher, inputs: Inputs
) -> None:
    student = Student(teacher, StudentConfig(parameters=parameters), seed=0)
    expected = teacher.model(*inputs)
    # Layers start mixed at r = 1, which is softmax too.
    torch.testing.assert_close(student.model(*inputs), expected, rtol=0, atol=0)
    for module in student.mixed.values():
        module.mode = "softmax"
    torch.testing.assert_close(student.model(*inputs), expected, rtol=0, atol=0)


def test_one_linear_layer_makes_a_difference(teacher: Teacher, inputs: Inputs) -> None:
    student = Student(teacher, StudentConfig(), seed=0)
    expected = teacher.model(*inputs)
    for layer in range(3):
        for other, module in student.mixed.items():
            module.mode = "linear" if other == layer else "softmax"
        assert not torch.allclose(student.model(*inputs), expected)


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
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_frozen_weights_are_in_memory_once_and_trained_ones_are_copies(
    parameters: str, teacher: Teacher
) -> None:
    student = Student(teacher, StudentConfig(parameters=parameters), seed=0)
    theirs = {p.data_ptr() for p in teacher.model.parameters()}
    shared = theirs & {p.data_ptr() for p in student.model.parameters()}
    assert shared == (set() if parameters == "full" else theirs)


@pytest.mark.parametrize("objective", ["adm", "dmd"])
@pytest.mark.parametrize("parameters", ["lora", "feature_maps"])
def test_a_student_on_shared_weights_trains_as_one_on_a_copy(
    parameters: str, objective: str, teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    trained = []
    for is_copy in (False, True):
        task = make_task(teacher, trajectories, parameters=parameters, objective=objective, steps=6)
        if is_copy:
            own = dataclasses.replace(teacher, model=copy.deepcopy(teacher.model))
            task = make_task(own, trajectories, parameters=parameters, objective=objective, steps=6)
            task.teacher = teacher
            assert task.student.model.head.head.weight is not teacher.model.head.head.weight
        fit(task, task.training, tmp_path / str(is_copy), seed=0)
        trained.append({n: p.detach().clone() for n, p in parameters_of(task).items()})
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_training_leaves_the_teacher_as_it_was(
    parameters: str, teacher: Teacher, trajectories: Trajectories, inputs: Inputs, tmp_path: Path
) -> None:
    names, before = [n for n, _ in teacher.model.named_parameters()], teacher.model(*inputs)
    task = make_task(teacher, trajectories, parameters=parameters, steps=3)
    fit(task, task.training, tmp_path, seed=0)
    assert not torch.equal(task.student.model(*inputs), before)
    assert torch.equal(teacher.model(*inputs), before)
    assert [n for n, _ in teacher.model.named_parameters()] == names


@pytest.mark.slow
def test_compiled_blocks_of_student_and_teacher_keep_their_own_attention(
    teacher: Teacher, inputs: Inputs
) -> None:
    student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
    for name, parameter in student.weights.items():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.05)
    for module in student.mixed.values():
        module.mode = "linear"
    with torch.no_grad():
        expected = [model(*inputs) for model in (student.model, teacher.model)]
        with compiled_blocks([student.model, teacher.model], student.sites):
            found = [model(*inputs) for model in (student.model, teacher.model)]
    assert not torch.allclose(*expected, atol=1e-2)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2])
def test_feature_maps_have_the_declared_width_and_the_seeds_start(
    ratio: int, teacher: Teacher
) -> None:
    students = [Student(teacher, StudentConfig(feature_ratio=ratio), seed=s) for s in (0, 0, 1)]
    for layer in range(3):
        first, again, other = (s.mixed[layer].linear for s in students)
        assert first.feature_dim == 128 * ratio
        assert torch.equal(first.query_map, again.query_map)
        assert not torch.equal(first.query_map, other.query_map)


def test_a_rank_beyond_the_models_is_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="--lora-rank 500 exceeds"):
        Student(teacher, StudentConfig(parameters="lora", lora_rank=500), seed=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_every_declared_parameter_is_reached_by_the_loss(
    parameters: str, objective: str, teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories, parameters=parameters, objective=objective)
    loss, metrics = task.loss(0, seed_step(0, 0))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert metrics["layer_scores"].shape == (3,)
    for name, parameter in parameters_of(task).items():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in teacher.model.parameters())


def test_the_first_step_of_a_softmax_student_has_nothing_to_learn(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories)
    for module in task.student.mixed.values():
        module.mode = "softmax"
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
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0, msg=name)


def test_the_hardened_choice_survives_a_restart(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    task = make_task(teacher, trajectories)
    assert task.state() == {"layers": None}
    for module, value in zip(task.student.mixed.values(), (0.1, 0.9, 0.2), strict=True):
        module.layer_score.data.fill_(value)
    for step in range(3):
        task.after_step(step)
    assert task.state() == {"layers": [0, 2]}
    restarted = make_task(teacher, trajectories)
    restarted.load_state(task.state())
    assert restarted.state() == task.state()
    choices = [module.choice for module in restarted.student.mixed.values()]
    assert choices == ["linear", "softmax", "linear"]
    assert float(restarted.selection.loss(4)) == 0
    undecided = make_task(teacher, trajectories)
    undecided.load_state({"layers": None})
    assert undecided.state() == {"layers": None}


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("objective", ["adm", "dmd"])
def test_a_transfer_interrupted_before_and_after_the_choice_equals_an_unbroken_one(
    objective: str, parameters: str, teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def train(folder: Path, moment: int | None = None) -> dict[str, Tensor]:
        task = make_task(
            teacher,
            trajectories,
            parameters=parameters,
            objective=objective,
            steps=6,
            checkpoint_every=1,
        )
        if moment is not None:
            loss = task.loss

            def stop(step: int, generator: torch.Generator) -> tuple:
                if step == moment:
                    raise Stopped
                return loss(step, generator)

            task.loss = stop
        fit(task, task.training, folder, seed=0)
        assert len(task.selection.layers) == 2
        return {n: p.detach().clone() for n, p in parameters_of(task).items()}

    unbroken = train(tmp_path / "unbroken")
    for moment in (1, 2, 4):
        with pytest.raises(Stopped):
            train(tmp_path / "broken", moment)
    broken = train(tmp_path / "broken")
    for name, tensor in unbroken.items():
        assert torch.equal(broken[name], tensor), name


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
def test_a_batch_trains_each_sample_in_one_guidance_branch(
    dropout: float, teacher: Teacher, trajectories: Trajectories
) -> None:
    drawn = draw_batch(teacher, trajectories, 63, dropout, seed_step(0, 0))
    states = trajectories.draw(63, seed_step(0, 0), "cpu")
    negative = teacher.negative_embeds
    num_dropped = 0
    for i, prompt in enumerate(states.prompt):
        assert torch.equal(drawn.prompt_embeds[i], teacher.prompt_embeds[prompt])
        assert torch.equal(drawn.negative_embeds[i], negative)
        is_dropped = torch.equal(drawn.branch_embeds[i], negative)
        num_dropped += is_dropped
        embeds = negative if is_dropped else teacher.prompt_embeds[prompt]
        assert torch.equal(drawn.branch_embeds[i], embeds)
        velocity = states.unconditional[i] if is_dropped else states.conditional[i]
        assert torch.equal(drawn.batch.velocity[i], velocity)
    # Four standard deviations of a binomial count, none at the ends.
    slack = 4 * (63 * dropout * (1 - dropout)) ** 0.5
    assert abs(num_dropped - 63 * dropout) <= slack
    assert torch.equal(drawn.batch.latents, states.latents)
    assert torch.equal(drawn.batch.step, states.step)


def test_parameter_names_are_unique_over_all_groups(
    teacher: Teacher, trajectories: Trajectories
) -> None:
    for parameters, objective in itertools.product(PARAMETERS, OBJECTIVES):
        task = make_task(teacher, trajectories, parameters=parameters, objective=objective)
        groups = task.parameter_groups()
        names = [name for group in groups for name in group.parameters]
        assert len(set(names)) == len(names)
        assert all(group.parameters for group in groups)
