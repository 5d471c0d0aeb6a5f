"""How long a training takes, whatever happens between its steps and however often it resumes."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from linvideo_core.run.files import write_json


class TrainingClock:
    """Hears a training's progress and knows its seconds, at the pace of the steps that it heard.

    seconds: of the whole training; None before its end, or where its last step went unheard.
    """

    def __init__(self, device: str, path: Path, num_untimed: int = 0) -> None:
        """path: a JSON file that keeps the seconds for a call that finds the training done.

        num_untimed: first steps that are not heard, since what they do is done once.
        """
        self.device = device
        self.num_untimed = num_untimed
        self.path = path
        self.seconds: float | None = None
        self._first: int | None = None
        self._started = self._held = 0.0
        if path.exists():
            self.seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]

    def hear(self, stage: str, done: int, total: int) -> None:
        """Take the time at the first and the last report of the training."""
        if stage != "training" or done < self.num_untimed:
            return
        if self._first is None:
            self._first, self._started = done, self._now()
        elif done == total > self._first:
            spent = self._now() - self._started - self._held
            self.seconds = spent / (done - self._first) * total
            write_json(self.path, {"seconds": self.seconds})

    @contextlib.contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Leave out the time of a block."""
        if self._first is None:
            yield
            return
        started = self._now()
        yield
        self._held += self._now() - started

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
