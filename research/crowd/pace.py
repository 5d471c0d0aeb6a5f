"""How long a training's step takes, so that trainings of equal time can be declared in steps."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linvideo_core.run.callbacks import Callbacks, Stage

from ..declared_runs import to_flags
from .trainings import TRAININGS

# A step that takes longer than so many usual ones compiles, allocates or saves, and is left out.
_MOST = 4
# How much is sampled first changes no step, nor which layers are linear if training chooses none.
_TIMELESS = ("num_trajectories", "layers")
_OF_FIXED_CHOICES = ("choice", "sensitivity")


class _StepClock(Callbacks):
    """Takes the time at every step of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.is_on, self.times = stage, False, []

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        self.is_on = stage == self.stage
        if self.is_on:
            self.times.append(time.monotonic())

    def on_step_end(self, done: int, **metrics: float) -> None:
        if self.is_on:
            self.times.append(time.monotonic())


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a training's settings that decide the time of its steps."""
    is_learned = settings.get("choice") == "learned"
    timeless = _TIMELESS if is_learned else (*_TIMELESS, *_OF_FIXED_CHOICES)
    return {name: value for name, value in settings.items() if name not in timeless}


def find_kind(training: str, settings: Mapping[str, Any]) -> str:
    """Return the trainings whose steps take as long, as the words of a command line."""
    return " ".join([training, *to_flags(decisive(settings))])


def measure_pace(
    training: str, words: Sequence[str], settings: Mapping[str, Any], folder: Path, steps: int
) -> float:
    """Train for a few steps in a new folder; return the mean seconds of a step.

    words: of the command line, which all trainings share; settings: what this kind has besides.
    A row of metrics is read after every step, so that a GPU is done with it.
    """
    chosen = TRAININGS[training]
    own = {
        **settings,
        "steps": steps,
        "log_every": 1,
        "checkpoint_every": steps,
        "warm_start_steps": 1,
        "seed": 0,
        "out": folder,
    }
    clock = _StepClock(chosen.stage)
    chosen.run(chosen.read([*words, *to_flags(own)]), clock, None)
    return mean_seconds([end - start for start, end in itertools.pairwise(clock.times)])


def mean_seconds(durations: Sequence[float]) -> float:
    """Return the mean of steps' seconds, without those above four times the median."""
    most = _MOST * statistics.median(durations)
    return statistics.fmean(duration for duration in durations if duration <= most)
