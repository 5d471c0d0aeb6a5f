"""What rounding the layer scores costs, measured at the step before the choice is made."""

from pathlib import Path

import pytest
import torch
from torch import nn

from linvideo_core.evaluate.sampler import CompareConfig, Evaluator
from linvideo_core.run.progress import silent
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.transfer.layer_selection.rules import SelectionConfig
from linvideo_core.transfer.student import Student, StudentConfig
from research.ablations.frame_cache import read_frames
from research.ablations.hardening import HardeningGap, summarize_gap
from research.ablations.teacher_cache import read_teacher, sample_teacher

SETTINGS = CompareConfig(num_samples=4, steps=3, batch_size=2)


def test_mixed_and_rounded_are_measured_once_and_the_student_is_left_as_it_was(
    teacher: Teacher, tmp_path: Path
) -> None:
    student = Student(teacher, StudentConfig(parameters="feature_maps"), seed=0)
    for module, score in zip(student.mixed.values(), (0.6, 0.9, 0.1), strict=True):
        module.layer_score.data.fill_(score)
    seen: dict[str, list[str | None]] = {}

    def measure(name: str, model: nn.Module) -> dict[str, float]:
        seen[name] = [module.choice for module in student.mixed.values()]
        return {"frechet": {"mixed": 2.0, "rounded": 3.0}[name], "motion": 1.0}

    config = SelectionConfig(target=2, selection_share=0.5)
    gap = HardeningGap(student, config, 10, tmp_path / "gap.json", measure)
    due = [done for done in range(11) if gap.is_due("training", done)]
    assert due == [4] and not gap.is_due("warm start", 4)
    gap.write(4)
    assert seen == {"mixed": [None] * 3, "rounded": ["linear", "softmax", "linear"]}
    assert [module.choice for module in student.mixed.values()] == [None] * 3
    assert not gap.is_due("training", 4)
    [found] = gap.points()
    assert found["layers"] == [0, 2]
    row = summarize_gap(found)
    assert row["score_distance"] == pytest.approx((0.4 + 0.1 + 0.1) / 3)
    assert row["gap_frechet"] == pytest.approx(0.5) and row["gap_motion"] == 0


def test_the_gap_is_measured_at_moments_spread_over_the_selection(
    teacher: Teacher, tmp_path: Path
) -> None:
    student = Student(teacher, StudentConfig(parameters="feature_maps"), seed=0)
    config, path = SelectionConfig(target=2, selection_share=0.5), tmp_path / "gap.json"

    def make() -> HardeningGap:
        return HardeningGap(student, config, 40, path, lambda *_: {"frechet": 1.0}, num_points=4)

    gap = make()
    due = [done for done in range(41) if gap.is_due("training", done)]
    assert due == [4, 9, 14, 19]
    for step in due[:2]:
        gap.write(step)
    # A training that resumes goes on from what is written.
    assert [done for done in range(41) if make().is_due("training", done)] == [14, 19]
    assert [point["step"] for point in make().points()] == [4, 9]


def test_a_student_measured_against_kept_samples_has_the_row_of_one_bench(
    teacher: Teacher, tmp_path: Path
) -> None:
    def make_evaluator() -> Evaluator:
        return Evaluator(teacher, SETTINGS, seed=5, precision="fp32", progress=silent)

    path = tmp_path / "samples.safetensors"
    own = sample_teacher(make_evaluator(), path)
    assert own["frechet_to_teacher"] == 0
    other = Student(teacher, StudentConfig(parameters="feature_maps"), seed=0)
    for module in other.mixed.values():
        module.mode = "linear"
    reference = read_teacher(make_evaluator(), path)
    found = reference.measure("student", other.model, frames=tmp_path / "new" / "frames")
    evaluator = make_evaluator()
    reference_row = evaluator.sample("teacher", teacher.model, is_teacher=True)
    samples = evaluator.sample("student", other.model)
    expected = evaluator.measure(
        samples, reference_row, evaluator.compare_velocities("student", other.model)
    )
    assert found.keys() == expected.keys()
    frames, prompts = read_frames(tmp_path / "new" / "frames")
    assert prompts == evaluator.prompts[: len(frames)]
    assert torch.allclose(frames, samples.frames[: len(frames)].clamp(0, 1), atol=1 / 255)
    for key in ("frechet_to_teacher", "distance_to_teacher", "velocity_error"):
        assert found[key] == pytest.approx(expected[key]) and found[key] > 0
    few = reference.first(2).measure("student", other.model)
    assert few["distance_to_teacher"] > 0 and "velocity_error" not in few
    assert torch.equal(reference.first(2).teacher.latents, reference_row.latents[:2])
