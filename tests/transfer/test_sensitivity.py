"""Layers are ranked by what each alone does to the velocity, and a ranking is made only once."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linvideo_core import artifact
from linvideo_core.flow import bind
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.context import Run
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer import pipeline
from linvideo_core.transfer.command import draw_training
from linvideo_core.transfer.config import (
    ARTIFACT_NAME,
    MEASURES,
    SelectionConfig,
    SensitivityConfig,
    StudentConfig,
    TransferConfig,
    WarmStartConfig,
)
from linvideo_core.transfer.layer_selection import RANKING_NAME, rank, rank_layers
from linvideo_core.transfer.student import Student
from tests.conftest import Recorder

from .conftest import VIDEOS


@pytest.fixture
def student(teacher: Teacher) -> Student:
    return Student(teacher, StudentConfig(parameters="feature_maps"), seed=0)


def measured(
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    folder: Path,
    callbacks: Callbacks | None = None,
    **settings: object,
) -> dict[int, float]:
    """Rank the layers; return the errors that are left in the folder's file."""
    folder.mkdir(exist_ok=True)
    config, run = (
        SensitivityConfig(**settings),
        Run(folder=folder, callbacks=callbacks or Callbacks()),
    )
    stored = (student.model, student.mixed, teacher, trajectories)
    ranking = rank_layers(*stored, config, run, batch_size=4)
    found = json.loads((folder / RANKING_NAME).read_text())
    errors = {int(layer): error for layer, error in found["errors"].items()}
    assert found["ranking"] == ranking == rank(errors, config)
    return errors


@pytest.mark.parametrize("kind", MEASURES)
def test_the_error_is_the_mean_over_stored_states_and_both_branches(
    kind: str, teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    errors = measured(
        student, teacher, trajectories, tmp_path, sensitivity=kind, sensitivity_videos=2
    )
    alone, rest = ("linear", "softmax") if kind == "replace-one" else ("softmax", "linear")
    states = trajectories.take(torch.arange(4), "cpu")
    prompts = teacher.prompt_embeds[states.prompt]
    negative = teacher.negative_embeds.expand_as(prompts)
    for layer, error in errors.items():
        for other, module in student.mixed.items():
            module.mode = alone if other == layer else rest
        expected = []
        for embeds, v in ((prompts, states.conditional), (negative, states.unconditional)):
            with torch.no_grad():
                u = bind(student.model, embeds)(states.latents, trajectories.sigmas[states.step])
            expected += [float((a - b).norm() / b.norm()) for a, b in zip(u, v, strict=True)]
        assert error == pytest.approx(sum(expected) / 8, rel=1e-4)
        assert error > 0


def test_a_layer_that_is_linear_at_no_cost_comes_first(
    teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    # Layer 2's attention adds nothing to what follows.
    site = next(site for site in student.sites if site.layer == 2)
    torch.nn.init.zeros_(teacher.model.get_submodule(site.name).o.weight)
    with student.disabled():
        exact = collect(teacher, VIDEOS, Run(folder=tmp_path / "exact" / "run"))
    errors = measured(student, teacher, exact, tmp_path)
    # What is left is the fp16 of the stored states.
    assert errors[2] < 5e-3 < min(errors[0], errors[1])


def test_the_layers_are_left_as_they_were_also_after_a_failure(
    teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    modes = ("linear", "mixed", "softmax")
    for module, mode in zip(student.mixed.values(), modes, strict=True):
        module.mode = mode
    measured(student, teacher, trajectories, tmp_path / "a")
    assert tuple(module.mode for module in student.mixed.values()) == modes
    with torch.no_grad():
        student.mixed[1].linear.query_map.fill_(float("nan"))
    with pytest.raises(ValueError, match="velocity error of layer 1 alone is nan"):
        measured(student, teacher, trajectories, tmp_path / "b")
    assert tuple(module.mode for module in student.mixed.values()) == modes


def test_an_interrupted_ranking_measures_only_what_is_missing_and_ends_the_same(
    teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = measured(student, teacher, trajectories, whole)
    stop, rest = Recorder(stop_at=("ranking_layers", 2)), Recorder()
    with pytest.raises(KeyboardInterrupt):
        measured(student, teacher, trajectories, broken, stop)
    assert json.loads((broken / RANKING_NAME).read_text())["ranking"] is None
    assert measured(student, teacher, trajectories, broken, rest) == expected
    assert rest.seen == [("ranking_layers", 2), ("ranking_layers", 3)]
    assert (broken / RANKING_NAME).read_bytes() == (whole / RANKING_NAME).read_bytes()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measure": 3}', '{"errors": {"x": null}}'])
def test_a_damaged_ranking_is_made_again(
    content: str,
    teacher: Teacher,
    student: Student,
    trajectories: Trajectories,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / RANKING_NAME).write_text(content)
    errors = measured(student, teacher, trajectories, tmp_path, sensitivity_videos=1)
    assert "is measured again" in caplog.text
    again = measured(student, teacher, trajectories, tmp_path, sensitivity_videos=2)
    assert again != errors


def test_the_smallest_error_comes_first_or_the_largest_where_softmax_was_restored() -> None:
    errors = {0: 0.2, 3: 0.1, 7: 0.3, 9: 0.1}
    replaced, restored = (SensitivityConfig(sensitivity=kind) for kind in MEASURES)
    assert rank(errors, replaced) == [3, 9, 0, 7]
    assert rank(errors, restored) == [7, 0, 3, 9]


def transfer_config(out: Path, **selection: object) -> TransferConfig:
    return TransferConfig(
        trajectories=VIDEOS,
        student=StudentConfig(lora_rank=4),
        warm_start=WarmStartConfig(warm_start_steps=4),
        selection=SelectionConfig(**selection),
        training=TrainingConfig(steps=6, batch_size=2, checkpoint_every=2, log_every=1),
        out=out,
        seed=3,
    )


def linearized(
    teacher: Teacher, config: TransferConfig, callbacks: Callbacks | None = None
) -> artifact.Artifact:
    run = Run(folder=config.out, seed=config.seed, callbacks=callbacks or Callbacks())
    with Student(teacher, config.student, seed=config.seed) as student:
        pipeline.linearize(student, teacher, config, run)
    return artifact.load(config.out / ARTIFACT_NAME)


def undated(made: artifact.Artifact) -> artifact.ArtifactHeader:
    """Return a header without the day of its making, which a run over midnight may change."""
    told = {key: value for key, value in made.header.provenance.items() if key != "date"}
    assert len(told) < len(made.header.provenance)
    return dataclasses.replace(made.header, provenance=told)


@pytest.mark.parametrize(
    ("selection", "layers", "choice"),
    [
        ({"choice": "alternate", "target": 1}, (1,), "alternate"),
        ({"layers": "2,0", "target": 2}, (0, 2), "listed"),
        ({"target": 2}, None, "learned"),
    ],
)
def test_a_fixed_choice_decides_the_artifacts_layers_and_draws_no_scores(
    selection: dict[str, object],
    layers: tuple[int, ...] | None,
    choice: str,
    teacher: Teacher,
    tmp_path: Path,
) -> None:
    config = transfer_config(tmp_path / "run", **selection)
    made = linearized(teacher, config)
    found = tuple(made.header.linear_layers)
    assert layers in (None, found) and made.header.provenance["choice"] == choice
    rows = (config.out / "training" / "metrics.jsonl").read_text().splitlines()
    assert [len(json.loads(row).get("layer_scores", [])) for row in rows] == [
        0 if layers else 3
    ] * 6
    draw_training(config.out, made.header, config.selection, 6)
    assert (config.out / "losses.png").exists()
    assert (config.out / "layer_scores.png").exists() == (layers is None)
    assert not (config.out / RANKING_NAME).exists()


@pytest.mark.parametrize("stage", ["ranking_layers", "training"])
def test_a_transfer_by_ranking_stopped_anywhere_ends_as_an_unbroken_one_bit_for_bit(
    stage: str, teacher: Teacher, tmp_path: Path
) -> None:
    config = transfer_config(tmp_path / "unbroken", target=2, choice="sensitivity")
    told = Recorder()
    expected = linearized(teacher, config, told)
    assert told.stages == ["sampling_teacher", "warm_start", "ranking_layers", "training"]
    ranking = json.loads((config.out / RANKING_NAME).read_text())["ranking"]
    assert tuple(sorted(ranking[:2])) == tuple(expected.header.linear_layers)
    assert expected.header.provenance["choice"] == "sensitivity (replace-one)"
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        linearized(teacher, broken, Recorder(stop_at=(stage, 2)))
    assert undated(linearized(teacher, broken)) == undated(expected)
    left, right = (load_file(run.out / ARTIFACT_NAME) for run in (broken, config))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name in (RANKING_NAME, "training/metrics.jsonl"):
        assert (broken.out / name).read_bytes() == (config.out / name).read_bytes(), name
