"""What a distillation can be refused for by headers and arithmetic alone."""

from typing import Protocol

from ..artifact import Artifact, check
from ..models.families import identify
from ..teacher.teacher import TeacherCheckpoint
from ..transfer.config import check_offload_alone
from ..transfer.preflight import (
    Footprint,
    RunConfig,
    check_footprint,
    count_maps,
    count_weights,
)
from .config import DistillationConfig


class FewStepConfig(RunConfig, Protocol):
    """What the config of a distillation has besides."""

    @property
    def distillation(self) -> DistillationConfig:
        """How few the steps are."""


def check_distillation(
    checkpoint: TeacherCheckpoint,
    config: FewStepConfig,
    artifact: Artifact,
    device: str,
    precision: str,
    num_processes: int = 1,
) -> Footprint:
    """Return what a distillation of a file takes.

    Raises ValueError, in one sentence, when it cannot work.
    """
    check_offload_alone(checkpoint.frozen_weights, num_processes)
    distillation = config.distillation
    linear = check(artifact, checkpoint.shapes)
    family, _ = identify(checkpoint.shapes)
    rank = max(distillation.lora_rank, artifact.header.lora_rank)
    changes = count_weights(checkpoint, family, distillation.parameters, rank)
    ratio = artifact.header.feature_dim // linear[0].head_dim
    num_trained = sum(count_maps(site, ratio) for site in linear) + 2 * changes
    # The student's loss and the critic's go backward together.
    return check_footprint(
        checkpoint,
        config,
        device,
        precision,
        num_trained=num_trained,
        num_graphs=2,
        all_trained=distillation.parameters == "full",
        num_processes=num_processes,
        may_offload=num_processes == 1,
    )
