"""Settings of a training."""

import dataclasses

from ..run.config import fraction, option, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    steps: int = option(300, "optimiser steps")
    batch_size: int = option(4, "samples of one forward pass, over all GPUs together")
    accumulation: int = option(1, "forward passes for one optimiser step")
    learning_rate: float = option(5e-4, "peak learning rate of the weights")
    map_learning_rate: float = option(2e-3, "peak learning rate of the feature maps")
    warmup_steps: int = option(20, "steps of linear warm-up; a cosine to zero follows")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm")
    ema_decay: float = option(0.99, "decay of the weight average that is kept as the result")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    checkpoint_every: int = option(50, "steps between checkpoints")
    log_every: int = option(5, "steps between rows of metrics.jsonl")
    compile: bool = option(False, "compile the blocks: a minute at the start, then much faster")
    activation_checkpointing: bool = option(False, "recompute blocks backward to save memory")

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size", "accumulation", "learning_rate", "map_learning_rate")
        positive(self, "clip_norm", "checkpoint_every", "log_every")
        fraction(self, "ema_decay")
