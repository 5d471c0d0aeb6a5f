"""A distillation that goes wrong is told so by its own metrics, and keeps what was good."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from linvideo_core import artifact
from linvideo_core.distill import command as distill
from linvideo_core.distill.config import DistillationConfig, DistillConfig
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.teacher.config import TeacherConfig, TrajectoryConfig
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.training.config import TrainingConfig
from linvideo_core.transfer.config import EvaluationConfig, StudentConfig
from linvideo_core.transfer.student import Student

TINY = WanConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model, its prompts and a file that makes one layer linear."""
    folder = tmp_path_factory.mktemp("files")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanModel(TINY)
        model.init_weights()
        torch.nn.init.normal_(model.head.head.weight, std=0.1)
        prompts = {"prompt_embeds": torch.randn(3, 4, 16), "negative_embeds": torch.zeros(4, 16)}
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file(prompts, folder / "prompts.safetensors")
    teacher = load_teacher(teacher_config(folder))
    with Student(teacher, StudentConfig(parameters="feature_maps"), seed=0) as student:
        student.harden([0])
        made = artifact.extract(
            student.model, teacher.model, parameters="feature_maps", objective="adm", steps=1,
            provenance={},
        )  # fmt: skip
    artifact.save(made, folder / "linearized.safetensors")
    return folder


def teacher_config(folder: Path) -> TeacherConfig:
    names = {name: folder / f"{name}.safetensors" for name in ("model", "prompts")}
    return TeacherConfig(**names, num_frames=5, height=32, width=32)


def distil(
    files: Path, out: Path, num_steps: int, critic_steps: int, critic_rate: float, **training: Any
) -> tuple[str, int | None, list[dict[str, Any]]]:
    """Run the command; return its sentence, the kept checkpoint's step, the rows of metrics."""
    config = DistillConfig(
        teacher=teacher_config(files),
        artifact=files / "linearized.safetensors",
        out=out,
        device="cpu",
        precision="fp32",
        evaluation=EvaluationConfig(evaluate_samples=0),
        trajectories=TrajectoryConfig(
            num_trajectories=4, states_per_trajectory=2, sampler_steps=4, shard_size=4, shift=1.0
        ),
        distillation=DistillationConfig(
            num_steps=num_steps,
            parameters="full",
            critic_steps=critic_steps,
            critic_learning_rate=critic_rate,
            real_guidance_scale=1.0,
        ),
        training=TrainingConfig(batch_size=8, checkpoint_every=3, log_every=1, **training),
    )
    with pytest.raises(ValueError) as ended:
        distill.run(config)
    assert not (out / distill.ARTIFACT_NAME).exists()
    lines = (out / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    path = out / "training" / "checkpoint.safetensors"
    kept = None
    if path.exists():
        with safe_open(path, framework="pt") as file:
            kept = int(file.metadata()["step"])
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
    return str(ended.value), kept, [json.loads(line) for line in lines]


def test_videos_that_come_to_a_halt_end_it_before_they_did(files: Path, tmp_path: Path) -> None:
    sentence, kept, rows = distil(
        files, tmp_path, 8, 1, 1e-2, steps=40, learning_rate=0.05, warmup_steps=30
    )
    assert "the videos came to a halt: their motion fell from" in sentence
    assert "the last good checkpoint is" in sentence and "\n" not in sentence
    best, halted = map(float, re.search("fell from ([0-9.]+) to ([0-9.]+)", sentence).groups())
    # The last of these readings is of the kept weights.
    assert kept and min(row["motion_ratio"] for row in rows[: kept + 1]) > best / 2
    # The row that ended it is not written; its median of five has four of these.
    assert halted < best / 2 and min(row["motion_ratio"] for row in rows[-4:]) < best / 2


def test_a_spike_of_the_critic_ends_it_before_it_rose(files: Path, tmp_path: Path) -> None:
    sentence, kept, rows = distil(
        files, tmp_path, 2, 2, 0.3, steps=40, learning_rate=1e-4, warmup_steps=40
    )
    assert "the critic's loss rose from" in sentence and "\n" not in sentence
    first = rows[0]["critic_loss"]
    assert rows[-1]["critic_loss"] > 10 * first
    assert kept and rows[kept]["critic_loss"] < 10 * first


def test_a_loss_that_is_no_number_ends_it_without_a_broken_checkpoint(
    files: Path, tmp_path: Path
) -> None:
    sentence, kept, rows = distil(
        files, tmp_path, 2, 2, 1e30, steps=40, learning_rate=1e30, warmup_steps=0
    )
    assert "the loss became nan at step 1; no good checkpoint is there" in sentence
    assert kept is None and len(rows) == 1


def test_weights_that_break_between_two_rows_never_reach_a_checkpoint(
    files: Path, tmp_path: Path
) -> None:
    """The same command stops again, from the same checkpoint."""
    settings = {"steps": 40, "learning_rate": 1e-4, "warmup_steps": 0}
    sentence, kept, _ = distil(files, tmp_path, 2, 2, 1e37, **settings)
    assert "finite" in sentence or "nan" in sentence or "inf" in sentence
    again, kept_again, _ = distil(files, tmp_path, 2, 2, 1e37, **settings)
    assert (again, kept_again) == (sentence, kept)
