"""Layers are ranked by what each alone does to the velocity, and a ranking is made only once."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linvideo_core import artifact
from linvideo_core.models.velocity import bind
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, TrajectoryConfig, collect
from linvideo_core.training.trainer import TrainingConfig
from linvideo_core.transfer import cli as transfer
from linvideo_core.transfer import pipeline
from linvideo_core.transfer.layer_selection.rules import SelectionConfig
from linvideo_core.transfer.layer_selection.sensitivity import (
    MEASURES,
    SensitivityConfig,
    measure,
    rank,
)
from linvideo_core.transfer.student import Student, StudentConfig
from linvideo_core.transfer.warm_start import WarmStartConfig

VIDEOS = TrajectoryConfig(
    num_trajectories=3, states_per_trajectory=2, sampler_steps=5, shard_size=2
)


@pytest.fixture
def trajectories(teacher: Teacher, tmp_path: Path) -> Trajectories:
    return collect(teacher, VIDEOS, tmp_path / "trajectories", seed=0)


@pytest.fixture
def student(teacher: Teacher) -> Student:
    return Student(teacher, StudentConfig(parameters="feature_maps"), seed=0)


def measured(
    student: Student, teacher: Teacher, trajectories: Trajectories, path: Path, **options: object
) -> dict[int, float]:
    settings = {name: options.pop(name) for name in list(options) if "sensitivity" in name}
    return measure(
        student.model,
        student.mixed,
        teacher,
        trajectories,
        SensitivityConfig(**settings),
        path,
        **{"batch_size": 4, "precision": "fp32", **options},
    )


@pytest.mark.parametrize("kind", MEASURES)
def test_the_error_is_the_mean_over_stored_states_and_both_branches(
    kind: str, teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    path = tmp_path / "sensitivity.json"
    errors = measured(student, teacher, trajectories, path, sensitivity=kind, sensitivity_videos=2)
    alone, rest = ("linear", "softmax") if kind == "replace-one" else ("softmax", "linear")
    states = trajectories.take(torch.arange(4), "cpu")
    prompts = teacher.prompt_embeds[states.prompt]
    negative = teacher.negative_embeds.expand_as(prompts)
    for layer, error in errors.items():
        for other, module in student.mixed.items():
            module.choice = alone if other == layer else rest
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
    for model in (student.model, teacher.model):
        torch.nn.init.zeros_(model.get_submodule(site.name).o.weight)
    exact = collect(teacher, VIDEOS, tmp_path / "exact", seed=0)
    path = tmp_path / "sensitivity.json"
    errors = measured(student, teacher, exact, path)
    # What is left is the fp16 of the stored states.
    assert errors[2] < 5e-3 < min(errors[0], errors[1])
    assert json.loads(path.read_text())["ranking"][0] == 2


def test_the_layers_are_left_as_they_were_also_after_a_failure(
    teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    choices = ("linear", None, "softmax")
    for module, choice in zip(student.mixed.values(), choices, strict=True):
        module.choice = choice
    measured(student, teacher, trajectories, tmp_path / "a.json")
    assert tuple(module.choice for module in student.mixed.values()) == choices
    with torch.no_grad():
        student.mixed[1].linear.query_map.fill_(float("nan"))
    with pytest.raises(ValueError, match="velocity error of layer 1 alone is nan"):
        measured(student, teacher, trajectories, tmp_path / "b.json")
    assert tuple(module.choice for module in student.mixed.values()) == choices


def test_an_interrupted_ranking_measures_only_what_is_missing_and_ends_the_same(
    teacher: Teacher, student: Student, trajectories: Trajectories, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    expected = measured(student, teacher, trajectories, whole)
    said: list[tuple[str, int, int]] = []

    def stop(stage: str, done: int, total: int, **_: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(student, teacher, trajectories, broken, progress=stop)
    assert json.loads(broken.read_text())["ranking"] is None

    def say(stage: str, done: int, total: int, **_: float) -> None:
        said.append((stage, done, total))

    assert measured(student, teacher, trajectories, broken, progress=say) == expected
    assert said == [("ranking the layers", 2, 3), ("ranking the layers", 3, 3)]
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measure": 3}', '{"errors": {"x": null}}'])
def test_a_damaged_ranking_is_made_again(
    content: str,
    teacher: Teacher,
    student: Student,
    trajectories: Trajectories,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(content)
    errors = measured(student, teacher, trajectories, path, sensitivity_videos=1)
    assert "is measured again" in caplog.text
    assert json.loads(path.read_text())["errors"] == {str(k): v for k, v in errors.items()}
    again = measured(student, teacher, trajectories, path, sensitivity_videos=2)
    assert again != errors


def test_the_smallest_error_comes_first_or_the_largest_where_softmax_was_restored() -> None:
    errors = {0: 0.2, 3: 0.1, 7: 0.3, 9: 0.1}
    replaced, restored = (SensitivityConfig(sensitivity=kind) for kind in MEASURES)
    assert rank(errors, replaced) == [3, 9, 0, 7]
    assert rank(errors, restored) == [7, 0, 3, 9]


def transfer_config(out: Path, **selection: object) -> pipeline.TransferConfig:
    return pipeline.TransferConfig(
        trajectories=VIDEOS,
        student=StudentConfig(lora_rank=4),
        warm_start=WarmStartConfig(warm_start_steps=4),
        selection=SelectionConfig(**selection),
        training=TrainingConfig(steps=6, batch_size=2, checkpoint_every=2, log_every=1),
        out=out,
        seed=3,
    )


def linearized(teacher: Teacher, config: pipeline.TransferConfig) -> artifact.Artifact:
    student = Student(teacher, config.student, seed=config.seed)
    pipeline.linearize(student, teacher, config, "fp32", lambda *_, **__: None)
    return artifact.load(config.out / transfer.ARTIFACT_NAME)


def undated(made: artifact.Artifact) -> artifact.ArtifactHeader:
    """Return a header without the day of its making, which a run over midnight may change."""
    told = {key: value for key, value in made.header.provenance.items() if key != "date"}
    assert len(told) < len(made.header.provenance)
    return dataclasses.replace(made.header, provenance=told)


@pytest.mark.parametrize(
    ("selection", "layers", "choice"),
    [
        ({"choice": "first", "target": 2}, (0, 1), "first"),
        ({"choice": "alternate", "target": 1}, (1,), "alternate"),
        ({"layers": "2,0", "target": 2}, (0, 2), "listed"),
    ],
)
def test_a_fixed_choice_decides_the_artifacts_layers_and_draws_no_scores(
    selection: dict[str, object],
    layers: tuple[int, ...],
    choice: str,
    teacher: Teacher,
    tmp_path: Path,
) -> None:
    config = transfer_config(tmp_path / "run", **selection)
    made = linearized(teacher, config)
    assert tuple(made.header.linear_layers) == layers
    assert made.header.provenance["choice"] == choice
    rows = (config.out / "training" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert not any("layer_scores" in json.loads(row) for row in rows)
    transfer.draw_training(config.out, layers, config.selection, 6)
    assert (config.out / "losses.png").exists()
    assert not (config.out / "layer_scores.png").exists()


def test_a_learned_choice_says_so_and_ranks_nothing(teacher: Teacher, tmp_path: Path) -> None:
    config = transfer_config(tmp_path / "run", target=2)
    made = linearized(teacher, config)
    assert made.header.provenance["choice"] == "learned"
    rows = (config.out / "training" / "metrics.jsonl").read_text().splitlines()
    assert all(len(json.loads(row)["layer_scores"]) == 3 for row in rows)
    assert not (config.out / "sensitivity.json").exists()


def test_learned_scores_start_from_the_ranking_of_the_run(teacher: Teacher, tmp_path: Path) -> None:
    config = transfer_config(tmp_path / "run", score_start="ranking", target=2)
    made = linearized(teacher, config)
    ranking = json.loads((config.out / "sensitivity.json").read_text())["ranking"]
    rows = (config.out / "training" / "metrics.jsonl").read_text().splitlines()
    scores = json.loads(rows[0])["layer_scores"]
    assert sorted(range(3), key=lambda layer: scores[layer]) == ranking
    expected = "learned, scores started from ranking (replace-one)"
    assert made.header.provenance["choice"] == expected
    transfer.draw_training(config.out, made.header.linear_layers, config.selection, 6)
    order = json.loads((config.out / "layer_order.json").read_text())
    assert order["measure"] == "replace-one"
    # Two steps of selection move no score past another.
    assert order["mean_correlation"] == order["last_correlation"] == pytest.approx(1)
    assert list(order["last_scores"].values()) == json.loads(rows[1])["layer_scores"]


@pytest.mark.parametrize("stage", ["ranking the layers", "training"])
@pytest.mark.parametrize("selection", [{"choice": "sensitivity"}, {"score_start": "ranking"}])
def test_a_transfer_by_ranking_stopped_anywhere_ends_as_an_unbroken_one_bit_for_bit(
    stage: str, selection: dict[str, str], teacher: Teacher, tmp_path: Path
) -> None:
    config = transfer_config(tmp_path / "unbroken", target=2, **selection)
    expected = linearized(teacher, config)
    found = json.loads((config.out / "sensitivity.json").read_text())
    if config.selection.choice == "sensitivity":
        assert tuple(sorted(found["ranking"][:2])) == tuple(expected.header.linear_layers)
        assert expected.header.provenance["choice"] == "sensitivity (replace-one)"

    broken = dataclasses.replace(config, out=tmp_path / "broken")

    def stop(name: str, done: int, total: int, **_: float) -> None:
        if (name, done) == (stage, 2):
            raise KeyboardInterrupt

    student = Student(teacher, config.student, seed=config.seed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.linearize(student, teacher, broken, "fp32", stop)
    assert undated(linearized(teacher, broken)) == undated(expected)
    left, right = (load_file(run.out / transfer.ARTIFACT_NAME) for run in (broken, config))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name in ("sensitivity.json", "training/metrics.jsonl"):
        assert (broken.out / name).read_bytes() == (config.out / name).read_bytes(), name


def test_every_stage_of_a_transfer_has_its_place_on_the_nodes_bar(
    teacher: Teacher, tmp_path: Path
) -> None:
    source = (Path(__file__).parents[2] / "nodes" / "transfer" / "live_preview.py").read_text(
        encoding="utf-8"
    )
    values = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_STAGES"
    ]
    places = ast.literal_eval(values[0])
    said: list[str] = []

    def say(stage: str, done: int, total: int, **_: float) -> None:
        said.append(stage.replace("the ", "").replace(" ", "_"))

    config = transfer_config(tmp_path / "run", score_start="ranking", target=1)
    student = Student(teacher, config.student, seed=0)
    config.out.mkdir()
    pipeline.linearize(student, teacher, config, "fp32", say)
    assert list(dict.fromkeys(said)) == list(places)
    ends = [end for place in places.values() for end in place[:2]]
    assert ends == sorted(ends) and (ends[0], ends[-1]) == (0, 100)


def test_no_videos_to_rank_on_are_refused() -> None:
    with pytest.raises(ValueError, match="--sensitivity-videos 0 given"):
        SensitivityConfig(sensitivity_videos=0)
