"""Stored states of the tiny teacher, for tests of what is trained on them."""

from pathlib import Path

import pytest

from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect

VIDEOS = TrajectoryConfig(
    num_trajectories=3, states_per_trajectory=2, sampler_steps=5, guidance_scale=2.0, shard_size=3
)


@pytest.fixture
def trajectories(teacher: Teacher, tmp_path: Path) -> Trajectories:
    """Two states of each of three videos, of five sampler steps."""
    return collect(teacher, VIDEOS, Run(folder=tmp_path / "stored"))
