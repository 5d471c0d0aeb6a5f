"""Settings of a training."""

import dataclasses

from ..run import limits
from ..run.config import Settings, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Training."""

    steps: int = option(300, "optimiser steps", limits.COUNT)
    batch_size: int = option(4, "samples of one forward pass, over all GPUs together", limits.COUNT)
    accumulation: int = option(1, "forward passes for one optimiser step", limits.COUNT)
    learning_rate: float = option(5e-4, "peak learning rate of the weights", limits.POSITIVE)
    map_learning_rate: float = option(
        2e-3, "peak learning rate of the feature maps", limits.POSITIVE
    )
    warmup_steps: int = option(
        20, "steps of linear warm-up; a cosine to zero follows", limits.COUNT_OR_NONE
    )
    clip_norm: float = option(1.0, "gradients are scaled down to this norm", limits.POSITIVE)
    ema_decay: float = option(
        0.99, "decay of the weight average that is kept as the result", limits.FRACTION
    )
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", limits.LOSS_WEIGHT)
    checkpoint_every: int = option(50, "steps between checkpoints", limits.COUNT)
    log_every: int = option(5, "steps between rows of metrics.jsonl", limits.COUNT)
    compile: bool = option(False, "compile the blocks: a minute at the start, then much faster")
    activation_checkpointing: bool = option(False, "recompute blocks backward to save memory")
