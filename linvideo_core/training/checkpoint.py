"""The checkpoint of a training, and those before it for as long as a fault may come to light."""

import dataclasses
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..run.files import remove, write_json, write_tensors
from ..run.process_group import ProcessGroup
from .fsdp import load_shards, save_shards

CHECKPOINT_NAME = "checkpoint.safetensors"
_FOLDER = "checkpoint-{:08d}"
_EARLIER = "checkpoint_before_"
_STATE_NAME = "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after `step` steps: its tensors by name, and its task's own state as JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder: a file, or a folder of shards."""
    shards = sorted(folder.glob(_FOLDER.format(0).replace("0" * 8, "[0-9]" * 8)))
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return shards[-1] if shards else None
    # Both: a process was stopped before it took the earlier one away.
    return shards[-1] if shards and _step_of(shards[-1]) > _read_file(path)[0] else path


def finished_steps(folder: Path) -> int:
    """Return how many steps the newest checkpoint in a folder holds; 0 where none can be read."""
    try:
        path = find_checkpoint(folder)
        if path is None:
            return 0
        return _step_of(path) if path.is_dir() else _read_file(path)[0]
    except (OSError, ValueError, KeyError, SafetensorError):
        return 0


def _read_file(path: Path) -> tuple[int, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return int(metadata["step"]), json.loads(metadata["state"])


def _measure_shards(path: Path) -> dict[str, int]:
    return {shard.name: shard.stat().st_size for shard in sorted(path.glob("*.safetensors"))}


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class Monitor(Protocol):
    """What looks at a training's metrics while it runs.

    delay: rows within which a fault is found, its first row included.
    """

    delay: int

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Take a row in plain numbers; return what is wrong with the training, or None."""


class CheckpointFiles:
    """The last checkpoint in a folder; beside it those back to one that any fault comes after.

    Every process of a process group calls alike; the first one alone moves files.

    delay: see `Monitor`; None: no fault is looked for, and one checkpoint is enough.
    """

    def __init__(self, folder: Path, delay: int | None, processes: ProcessGroup) -> None:
        self.folder = folder
        self.processes = processes
        self._delay = delay
        # One row more than the delay: a checkpoint's first row is of its own weights.
        self._recent: deque[int] = deque(maxlen=(delay or 0) + 1)
        with processes.in_turn():
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
        """Return the last checkpoint.

        like: the parameters by name; a process group's tensors become shards as theirs.

        Raises ValueError, KeyError or SafetensorError for one that is damaged.
        """
        path, is_alone = self.path, self.processes.size == 1
        if path.is_dir():
            found = json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
            step, state, sizes = found["step"], found["state"], _measure_shards(path)
            if found["shards"] != sizes:
                raise ValueError(f"it holds the shards {sizes} and was left with {found['shards']}")
            tensors = load_shards(path, like, is_alone=is_alone)
        else:
            step, state = _read_file(path)
            tensors = load_file(path) if is_alone else load_shards(self.folder, like)
        self._step = step
        return Checkpoint(step=step, tensors=tensors, state=state)

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; drop those that no fault can lead back to.

        Raises OSError where that fails; the earlier one is then intact.
        """
        if self._delay is not None:
            with self.processes.in_turn():
                if self.processes.is_first and (path := self.path):
                    path.replace(path.with_name(f"{_EARLIER}{self._step}{path.suffix}"))
        if self.processes.size == 1:
            metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
            write_tensors(self.folder / CHECKPOINT_NAME, checkpoint.tensors, metadata)
            self._remove_folders(but=None)
        else:
            self._write_shards(checkpoint)
        self._step = checkpoint.step
        if self.processes.is_first:
            best = max(filter(self._is_good, self._earlier()), default=0)
            self._remove_earlier(before=best)

    def _write_shards(self, checkpoint: Checkpoint) -> None:
        path = self.folder / _FOLDER.format(checkpoint.step)
        part = path.with_name(f".{path.name}.part")
        if self.processes.is_first:
            remove(part)
            part.mkdir()
        self.processes.wait()
        save_shards(part, checkpoint.tensors)
        if self.processes.is_first:
            state = {"step": checkpoint.step, "state": checkpoint.state}
            write_json(part / _STATE_NAME, {**state, "shards": _measure_shards(part)})
            remove(path)
            os.replace(part, path)
            self._remove_folders(but=path)
            (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        self.processes.wait()

    def _remove_folders(self, *, but: Path | None) -> None:
        for path in self.folder.glob("*checkpoint-*"):
            if path.is_dir() and path != but:
                remove(path)

    def see_row(self, step: int) -> None:
        """Take note that metrics were logged in step number `step`."""
        self._recent.append(step)

    def return_to_good(self) -> None:
        """After a fault in the last row: leave the last checkpoint from before it, or none."""
        with self.processes.in_turn():
            if not self.processes.is_first:
                return
            earlier = self._earlier()
            if not self._is_good(self._step):
                if path := self.path:
                    remove(path)
                if (best := max(filter(self._is_good, earlier), default=None)) is not None:
                    self._put_back(best, earlier)
            self._remove_earlier()

    def finish(self) -> None:
        """Drop what only an unfinished training needs."""
        if self.processes.is_first:
            self._remove_earlier()

    def _remove_earlier(self, before: float = math.inf) -> None:
        for step, path in self._earlier().items():
            if step < before:
                remove(path)

    def _put_back(self, step: int, earlier: Mapping[int, Path]) -> None:
        path = earlier[step]
        path.replace(path.with_name(CHECKPOINT_NAME if path.is_file() else _FOLDER.format(step)))

    def _earlier(self) -> dict[int, Path]:
        paths = self.folder.glob(f"{_EARLIER}*")
        return {int(path.stem.removeprefix(_EARLIER)): path for path in paths}

    def _is_good(self, step: int) -> bool:
        """Say whether a fault that is found in the last row began after `step` steps were taken."""
        return len(self._recent) == self._recent.maxlen and step <= self._recent[0]
