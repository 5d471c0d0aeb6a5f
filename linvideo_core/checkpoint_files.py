"""The checkpoint of a training, and those before it for as long as a fault may come to light."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from .storage import write_tensors

CHECKPOINT_NAME = "checkpoint.safetensors"
_EARLIER_NAME = "checkpoint_before_{}.safetensors"


class Watch(Protocol):
    """What looks at a training's metrics while it runs.

    delay: rows within which a fault is found, its first row included.
    """

    delay: int

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Take a row in plain numbers; return what is wrong with the training, or None."""


class CheckpointFiles:
    """The last checkpoint at `path`; beside it those back to one that any fault must come after.

    step: training steps that the last checkpoint holds; 0 where there is none.
    """

    def __init__(self, folder: Path, delay: int | None) -> None:
        """delay: rows of metrics within which a fault is found, its first row included.

        None: no fault is looked for, and one file is enough.
        """
        self.path = folder / CHECKPOINT_NAME
        self.step = 0
        self._delay = delay
        # One row more than the delay: a checkpoint's first row is of its own weights.
        self._recent: deque[int] = deque(maxlen=(delay or 0) + 1)
        if not self.path.exists() and (earlier := self._earlier()):
            # It was stopped between the two halves of `write`.
            earlier[max(earlier)].replace(self.path)

    def describe(self) -> str:
        """Say, in a part of a sentence, what is kept when training ends early."""
        if not self.path.exists():
            return "no good checkpoint is there"
        return f"the last good checkpoint is {self.path}"

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata of the last checkpoint; raise what safetensors raises."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}

    def write(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write the checkpoint after `step` steps; drop those that no fault can lead back to."""
        if self._delay is not None and self.path.exists():
            self.path.replace(self.path.with_name(_EARLIER_NAME.format(self.step)))
        write_tensors(self.path, tensors, metadata)
        self.step = step
        earlier = self._earlier()
        best = max(filter(self._is_good, earlier), default=0)
        for old, path in earlier.items():
            if old < best:
                path.unlink()

    def see_row(self, step: int) -> None:
        """Take note that metrics were logged in step number `step`."""
        self._recent.append(step)

    def return_to_good(self) -> None:
        """After a fault in the last row: leave the last checkpoint from before it, or none."""
        earlier = self._earlier()
        if not self._is_good(self.step):
            best = max(filter(self._is_good, earlier), default=None)
            if best is None:
                self.path.unlink(missing_ok=True)
            else:
                earlier.pop(best).replace(self.path)
        for path in earlier.values():
            path.unlink()

    def finish(self) -> None:
        """Drop what only an unfinished training needs."""
        for path in self._earlier().values():
            path.unlink()

    def _earlier(self) -> dict[int, Path]:
        paths = self.path.parent.glob(_EARLIER_NAME.format("*"))
        return {int(path.stem.rpartition("_")[2]): path for path in paths}

    def _is_good(self, step: int) -> bool:
        """Say whether a fault that is found in the last row began after `step` steps were taken."""
        return len(self._recent) == self._recent.maxlen and step <= self._recent[0]
