"""The checkpoint of a training, and those before it for as long as a fault may come to light."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .checkpoints import (
    Checkpoint,
    find_checkpoint,
    name_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .storage import remove
from .team import Team

_EARLIER = "checkpoint_before_"


class Watch(Protocol):
    """What looks at a training's metrics while it runs.

    delay: rows within which a fault is found, its first row included.
    """

    delay: int

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Take a row in plain numbers; return what is wrong with the training, or None."""


class CheckpointFiles:
    """The last checkpoint in a folder; beside it those back to one that any fault comes after.

    Every process of a team calls alike; the first one alone moves files.
    """

    def __init__(self, folder: Path, delay: int | None, team: Team) -> None:
        """delay: rows of metrics within which a fault is found, its first row included.

        None: no fault is looked for, and one checkpoint is enough.
        """
        self.folder = folder
        self.team = team
        self._delay = delay
        # One row more than the delay: a checkpoint's first row is of its own weights.
        self._recent: deque[int] = deque(maxlen=(delay or 0) + 1)
        with team.in_turn():
            if self.path is None and (earlier := self._earlier()):
                # It was stopped between the two halves of `write`.
                self._put_back(max(earlier), earlier)
        self._step = 0

    @property
    def path(self) -> Path | None:
        """The last checkpoint, None before there is one."""
        return find_checkpoint(self.folder)

    def describe(self) -> str:
        """Say, in a part of a sentence, what is kept when training ends early."""
        path = self.path
        return f"the last good checkpoint is {path}" if path else "no good checkpoint is there"

    def read(self, like: Mapping[str, Tensor]) -> Checkpoint:
        """Return the last checkpoint; see `read_checkpoint`."""
        checkpoint = read_checkpoint(self.path, like, self.team)
        self._step = checkpoint.step
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; drop those that no fault can lead back to."""
        if self._delay is not None:
            with self.team.in_turn():
                if self.team.is_first and (path := self.path):
                    path.replace(path.with_name(f"{_EARLIER}{self._step}{path.suffix}"))
        write_checkpoint(self.folder, checkpoint, self.team)
        self._step = checkpoint.step
        if self.team.is_first:
            earlier = self._earlier()
            best = max(filter(self._is_good, earlier), default=0)
            for step, path in earlier.items():
                if step < best:
                    remove(path)

    def see_row(self, step: int) -> None:
        """Take note that metrics were logged in step number `step`."""
        self._recent.append(step)

    def return_to_good(self) -> None:
        """After a fault in the last row: leave the last checkpoint from before it, or none."""
        with self.team.in_turn():
            if not self.team.is_first:
                return
            earlier = self._earlier()
            if not self._is_good(self._step):
                if path := self.path:
                    remove(path)
                if (best := max(filter(self._is_good, earlier), default=None)) is not None:
                    self._put_back(best, earlier)
            for path in self._earlier().values():
                remove(path)

    def finish(self) -> None:
        """Drop what only an unfinished training needs."""
        if self.team.is_first:
            for path in self._earlier().values():
                remove(path)

    def _put_back(self, step: int, earlier: Mapping[int, Path]) -> None:
        path = earlier[step]
        path.replace(path.with_name(name_checkpoint(step, is_file=path.is_file())))

    def _earlier(self) -> dict[int, Path]:
        paths = self.folder.glob(f"{_EARLIER}*")
        return {int(path.stem.removeprefix(_EARLIER)): path for path in paths}

    def _is_good(self, step: int) -> bool:
        """Say whether a fault that is found in the last row began after `step` steps were taken."""
        return len(self._recent) == self._recent.maxlen and step <= self._recent[0]
