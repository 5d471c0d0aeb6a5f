"""A warm start that is borrowed is the one that would have been fitted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linvideo_core.run.config import override
from linvideo_core.run.progress import silent
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.transfer.config import ARTIFACT_NAME, TransferConfig
from linvideo_core.transfer.pipeline import linearize
from linvideo_core.transfer.student import Student
from research.ablations.shared_warm_start import sharing

SETTINGS = {
    "num_trajectories": 3,
    "states_per_trajectory": 2,
    "sampler_steps": 4,
    "warm_start_steps": 4,
    "steps": 3,
    "batch_size": 3,
    "target": 1,
    "lora_rank": 4,
    "evaluate_samples": 0,
}


def train(teacher: Teacher, out: Path, shared: Path | None, **changes: object) -> list[str]:
    """Run a transfer; return the stages whose steps were really taken."""
    config = override(TransferConfig(), {**SETTINGS, "out": out, **changes})
    taken: list[str] = []

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        if 0 < done < total and stage not in taken:
            taken.append(stage)

    student = Student(teacher, config.student, seed=config.seed)
    if shared is None:
        linearize(student, teacher, config, "fp32", silent)
        return taken
    with sharing(shared, config):
        linearize(student, teacher, config, "fp32", progress)
    return taken


def test_what_borrows_ends_as_what_fitted_its_own(teacher: Teacher, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert "warm start" in train(teacher, tmp_path / "first", shared, objective="velocity")
    assert "warm start" not in train(teacher, tmp_path / "second", shared)
    train(teacher, tmp_path / "alone", None)
    borrowed, own = (load_file(tmp_path / n / ARTIFACT_NAME) for n in ("second", "alone"))
    assert borrowed.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(borrowed[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"feature_ratio": 2}, {"batch_size": 2}, {"warm_start_steps": 3}]
)
def test_another_fit_is_not_borrowed(
    teacher: Teacher, tmp_path: Path, changes: dict[str, int]
) -> None:
    train(teacher, tmp_path / "first", tmp_path / "shared")
    assert "warm start" in train(teacher, tmp_path / "second", tmp_path / "shared", **changes)
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_without_a_warm_start_nothing_is_kept(teacher: Teacher, tmp_path: Path) -> None:
    config = override(TransferConfig(), {"warm_start_steps": 0, "out": tmp_path / "run"})
    with sharing(tmp_path / "shared", config):
        pass
    assert not (tmp_path / "shared").exists()
