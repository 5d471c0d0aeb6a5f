"""What a distillation is set to by the model, the quality and the card."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.sizes import SIZES
from linvideo_core.artifact import Artifact, save
from linvideo_core.artifact.header import ArtifactHeader, Usage
from linvideo_core.distill import cli, command, recipe
from linvideo_core.distill.config import DistillationConfig, DistillConfig
from linvideo_core.distill.preflight import check_distillation, count_calls, forecast
from linvideo_core.distill.task import DistillationTask, make_student
from linvideo_core.distill.teacher_statistics import TeacherStatistics
from linvideo_core.evaluate import compare
from linvideo_core.models.attention_sites import fingerprint
from linvideo_core.models.families import identify
from linvideo_core.run.config import override
from linvideo_core.run.context import Run
from linvideo_core.run.errors import SettingError
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer.config import QUALITIES
from tests.conftest import assert_fitted, headers_of, open_headers, save_inputs


def file_for(name: str) -> Artifact:
    """Return a file that makes the published share of layers linear, by feature maps alone."""
    family, sites = identify(headers_of(name).shapes)
    linear = {site.layer: site for site in sites if site.layer in SIZES[name].layers}
    header = ArtifactHeader(
        family=family.name,
        fingerprint=fingerprint(family, sites),
        weights_digest=16 * "0",
        linear_layers=tuple(linear),
        site_names=tuple(site.name for site in linear.values()),
        num_layers=len(sites),
        feature_dim=sites[0].head_dim,
        parameters="feature_maps",
        objective="adm",
        steps=1,
    )
    shapes = header.tensor_shapes(sites[0].num_heads, sites[0].head_dim)
    maps = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
    return Artifact(header=header, linear=dict.fromkeys(linear, maps))


def settings_of(monkeypatch: pytest.MonkeyPatch, name: str, **given: Any) -> dict[str, Any]:
    open_headers(monkeypatch, name)
    monkeypatch.setattr(compare, "load_linearized", lambda path: file_for(name))
    files = {"model": Path("wan"), "artifact": Path("linearized")}
    return recipe.find_settings("demo", {**files, **given})


@pytest.mark.parametrize(
    ("name", "given", "batch_size", "accumulation", "offload_blocks"),
    [
        ("1.3b-480p", {"card": 24}, 2, 4, 0),
        ("1.3b-480p", {"card": 24, "quality": "draft"}, 2, 2, 0),
        ("1.3b-480p", {"card": 24, "batch_size": 1, "quality": "best"}, 1, 16, 0),
        ("14b-480p", {"card": 48}, 1, 8, 32),
        ("14b-480p", {"card": 48, "compile": True}, 1, 8, 0),
        ("14b-480p", {"card": 80}, 1, 8, 0),
    ],
)
def test_a_card_decides_how_many_videos_of_a_step_go_through_the_model_at_once(
    name: str,
    given: dict[str, Any],
    batch_size: int,
    accumulation: int,
    offload_blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = settings_of(monkeypatch, name, device="cuda", **given)
    assert_fitted(found, batch_size, accumulation, offload_blocks)
    override(DistillConfig(), {**found, "model": Path("wan"), "artifact": Path("made"), **given})


@pytest.mark.parametrize(("card", "batch"), [(80, (8, 1)), (60, (4, 2))])
def test_processes_share_the_weights_and_the_videos_of_a_step(
    card: int, batch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = settings_of(monkeypatch, "14b-480p", device="cuda", card=card)
    assert (found["batch_size"], found["accumulation"]) == batch
    assert "offload_blocks" not in found


@pytest.mark.parametrize("model", [None, "1.3b-480p"])
def test_every_quality_holds_diversity_and_a_better_one_learns_longer(
    model: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured on the embedded model: half of the teacher's guidance, and a regression."""
    found = []
    for quality in QUALITIES:
        how = {"quality": quality, "device": "cpu"}
        if model is None:
            found.append(recipe.find_settings("demo", how))
        else:
            found.append(settings_of(monkeypatch, model, **how))
    for each in found:
        assert each["real_guidance_scale"] == each["guidance_scale"] / 2
        assert each["regression_weight"] == 1
    for key in ("steps", "num_trajectories"):
        assert sorted({each[key] for each in found}) == [each[key] for each in found]


def test_the_guidance_baked_in_follows_the_teachers_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scales = {}
    for guidance in (7.0, 1.0):
        found = settings_of(monkeypatch, "1.3b-480p", device="cpu", guidance_scale=guidance)
        scales[guidance] = found["real_guidance_scale"]
    assert scales == {7.0: 3.5, 1.0: 1.0}
    assert cli.read(["--real-guidance-scale", "2"]).distillation.real_guidance_scale == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--preset", "gpu", "--model", "wan.safetensors"], "--preset gpu given"),
        (["--quality", "fine"], "--quality fine given; one of draft, standard, best is needed"),
        (["--card", "-1"], "--card -1 is for a --model of your own"),
        (
            ["--batch-size", "1"],
            "--batch-size 1 and --accumulation 1 given; together --num-steps 4",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.read(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in error and error.count("\n") == 1


def test_a_model_without_a_file_that_was_made_for_it_is_refused(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = save_inputs(teacher, tmp_path)
    given = [str(word) for pair in paths.items() for word in pair]
    for more, sentence in (
        ([], "--model was given without --artifact"),
        (["--artifact", "none.safetensors"], "none.safetensors"),
    ):
        with pytest.raises(SystemExit):
            cli.read([*given, *more])
        assert sentence in capsys.readouterr().err


@pytest.fixture
def config(teacher: Teacher, linearized: Artifact, tmp_path: Path) -> DistillConfig:
    """A small distillation of a file on disk."""
    save(linearized, tmp_path / "linearized.safetensors")
    paths = save_inputs(teacher, tmp_path)
    values = {"artifact": tmp_path / "linearized.safetensors", "out": tmp_path / "run"}
    values |= {name.removeprefix("--"): path for name, path in paths.items()}
    values |= {"num_frames": 5, "height": 32, "width": 32, "num_trajectories": 3, "shard_size": 1}
    values |= {"sampler_steps": 4, "states_per_trajectory": 2, "steps": 10, "lora_rank": 4}
    return override(DistillConfig(), {**values, "evaluate_samples": 2, "evaluate_batch_size": 1})


@pytest.mark.parametrize("num_samples", [0, 2])
def test_a_file_gets_its_card_whether_it_is_compared_or_not(
    num_samples: int, config: DistillConfig
) -> None:
    short = {"steps": 1, "evaluate_samples": num_samples, "device": "cpu", "precision": "fp32"}
    command.run(override(config, short))
    card = (config.out / "README.md").read_text(encoding="utf-8")
    assert ("## Measured" in card) == (num_samples > 0)
    assert "FlowMatchLCMScheduler" in card and "model (digest" in card
    assert "width=32, height=32, num_frames=5, guidance_scale=1.0, num_inference_steps=4" in card


def test_as_many_numbers_are_trained_as_memory_was_counted_for(
    teacher: Teacher, linearized: Artifact, config: DistillConfig
) -> None:
    checkpoint = open_teacher(config.teacher)
    footprint = check_distillation(checkpoint, config, linearized, "cpu", "fp32")
    with make_student(teacher, linearized, config.distillation, seed=0) as student:
        task = DistillationTask(
            student, teacher, TeacherStatistics(spread=1, motion=1), config.distillation,
            training=TrainingConfig(), shift=3.0, run=Run(),
        )  # fmt: skip
        parts = [p for group in task.parameter_groups() for p in group.parameters.values()]
        task.remove_critic()
    assert footprint.num_trained == sum(p.numel() for p in parts)


@pytest.mark.parametrize(("sigma_from", "sigma_to"), [(1.0, 0.875), (0.875, 0.0)])
def test_the_file_of_one_of_two_experts_is_refused(
    sigma_from: float, sigma_to: float, linearized: Artifact, config: DistillConfig
) -> None:
    usage = Usage(sigma_from=sigma_from, sigma_to=sigma_to)
    header = dataclasses.replace(linearized.header, usage=usage)
    save(dataclasses.replace(linearized, header=header), config.artifact)
    with pytest.raises(SettingError, match=f"noise levels from {sigma_from:g} to {sigma_to:g} al"):
        command.run(config)
    assert not config.out.exists()


def test_a_run_is_told_beforehand_in_calls_of_the_teacher(
    teacher: Teacher, linearized: Artifact, config: DistillConfig
) -> None:
    checkpoint = open_teacher(config.teacher)
    footprint = check_distillation(checkpoint, config, linearized, "cpu", "fp32")
    found = forecast(teacher, config, Run(folder=config.out), footprint)
    call = found.sampling / (3 * 4)
    # Two models: two videos of four steps, a first call, features; the student: four noise levels.
    # Four times six calls are timed.
    compared = 2 * (2 * 4 + 1 + 1) + 4 + 4 * 6
    assert call > 0 and found.comparing == pytest.approx(compared * call)
    assert found.warm_start == 0
    step = config.training.batch_size * count_calls(config.distillation) * call
    assert found.training == pytest.approx(10 * step)
    assert found.memory_bytes == footprint.memory_bytes and found.disk_bytes > 0
    assert not config.out.exists()


def test_a_step_costs_more_the_more_often_the_student_learns_and_from_endings_too() -> None:
    costs = [
        count_calls(DistillationConfig(critic_steps=every, regression_weight=weight))
        for every, weight in [(10**6, 1), (5, 0), (5, 1), (1, 1)]
    ]
    assert costs == sorted(costs) and len({*costs}) == 4
