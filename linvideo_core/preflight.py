"""What a run can be refused for by headers and arithmetic alone, before anything long begins."""

import math
from typing import Protocol

from . import lora
from .adapters import AttentionSite, ModelFamily, identify
from .artifact import Artifact, check
from .distillation import DistillationConfig
from .evidence import EvidenceConfig
from .held import check_held_alone
from .linearization import TransferConfig
from .memory import (
    FP32,
    Need,
    Transformer,
    check_memory,
    count,
    count_low_rank,
    training_needs,
)
from .selection import check_layers
from .subject import Draft
from .training import TrainingConfig
from .trajectories import TrajectoryConfig


class RunConfig(Protocol):
    """What the configs of a transfer and of a distillation have in common."""

    @property
    def trajectories(self) -> TrajectoryConfig:
        """How the teacher is sampled."""

    @property
    def training(self) -> TrainingConfig:
        """How the student is trained."""

    @property
    def evidence(self) -> EvidenceConfig:
        """What is sampled in the end."""


class FewStepConfig(RunConfig, Protocol):
    """What the config of a distillation has besides."""

    @property
    def distillation(self) -> DistillationConfig:
        """How few the steps are."""


def check_transfer(
    draft: Draft, config: TransferConfig, device: str, precision: str, num_processes: int = 1
) -> None:
    """Raise ValueError, in one sentence, when a transfer of a subject cannot work."""
    check_held_alone(draft.held, num_processes)
    family, sites = identify(draft.shapes)
    check_layers(config.selection, [site.layer for site in sites])
    student = config.student
    num_trained = sum(_count_maps(site, student.feature_ratio) for site in sites)
    num_trained += _count_weights(draft, family, student.parameters, student.lora_rank)
    _check_memory(draft, config, device, precision, num_trained=num_trained, num_graphs=1)


def check_distillation(
    draft: Draft,
    config: FewStepConfig,
    artifact: Artifact,
    device: str,
    precision: str,
    num_processes: int = 1,
) -> None:
    """Raise ValueError, in one sentence, when a distillation of a file cannot work."""
    check_held_alone(draft.held, num_processes)
    distillation = config.distillation
    linear = check(artifact, draft.shapes)
    family, _ = identify(draft.shapes)
    rank = max(distillation.rank, artifact.header.lora_rank)
    changes = _count_weights(draft, family, distillation.train, rank)
    ratio = artifact.header.feature_dim // linear[0].head_dim
    num_trained = sum(_count_maps(site, ratio) for site in linear) + 2 * changes
    # The student's loss and the critic's go backward together.
    _check_memory(draft, config, device, precision, num_trained=num_trained, num_graphs=2)


def _count_weights(draft: Draft, family: ModelFamily, parameters: str, rank: int) -> int:
    if parameters == "full":
        return count(draft.shapes, family.trainable_prefix)
    if parameters == "lora":
        lora.check_rank(draft.shapes, family.trainable_prefix, rank)
        return count_low_rank(draft.shapes, family.trainable_prefix, rank)
    return 0


def _count_maps(site: AttentionSite, feature_ratio: int) -> int:
    return site.num_heads * site.head_dim * site.head_dim * feature_ratio


def _check_memory(
    draft: Draft,
    config: RunConfig,
    device: str,
    precision: str,
    *,
    num_trained: int,
    num_graphs: int,
) -> None:
    num_parameters = count(draft.shapes)
    reading = Need("the model while it is read", FP32 * num_parameters)
    check_memory([reading], "cpu", "choose a smaller model or a machine with more memory")
    model = draft.checkpoint.config
    patches = zip(draft.latent_shape[1:], model.patch_size, strict=True)
    needs = training_needs(
        Transformer(
            dim=model.dim,
            ffn_dim=model.ffn_dim,
            num_layers=model.num_layers,
            num_tokens=math.prod(-(-size // patch) for size, patch in patches),
        ),
        num_parameters=num_parameters,
        num_copies=1,
        num_trained=num_trained,
        num_graphs=num_graphs,
        batch_size=config.training.batch_size,
        sampled_together=max(
            min(config.trajectories.shard_size, config.trajectories.num_trajectories),
            min(config.evidence.evaluate_batch_size, config.evidence.evaluate_samples),
        ),
        is_checkpointed=config.training.activation_checkpointing,
        precision=precision,
    )
    check_memory([*needs, draft.source.need(device)], device)
