"""Hooks that a long computation calls, so that whoever waits can see where it stands."""

from typing import Literal

Stage = Literal[
    "encoding_prompts",
    "sampling_teacher",
    "filling_pool",
    "warm_start",
    "ranking_layers",
    "training",
    "distillation",
    "evaluation",
]


class Callbacks:
    """What a computation calls while it runs; this base class does nothing.

    A hook may raise, which stops the computation at a step: what was finished is kept.
    """

    def on_estimate(self, seconds: float) -> None:
        """Take note of how long all that follows is expected to last."""

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        """Begin a stage of `total` units, of which an earlier run finished `done`.

        detail: tells stages of one kind apart, such as which model is sampled.
        """

    def on_step_end(self, done: int, **metrics: float) -> None:
        """React to `done` finished units of the stage, with figures worth showing."""
