"""The checkpoint of a training, and those before it for as long as a fault may come to light."""

import dataclasses
import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..run.files import remove, write_json, write_tensors
from ..run.process_group import ProcessGroup
from .fsdp import load_shards, save_shards

CHECKPOINT_NAME = "checkpoint.safetensors"
_FOLDER = "checkpoint-{:08d}"
_STATE_NAME = "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after `step` steps: its tensors by name, and its task's own state as JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def name_checkpoint(step: int, *, is_file: bool) -> str:
    """Return how a checkpoint of one process, or of several, is called in its folder."""
    return CHECKPOINT_NAME if is_file else _FOLDER.format(step)


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


def read_checkpoint(path: Path, like: Mapping[str, Tensor], processes: ProcessGroup) -> Checkpoint:
    """Read what `find_checkpoint` found.

    like: the parameters by name; a process group's tensors become shards as theirs.

    Raises ValueError, KeyError or SafetensorError for one that is damaged.
    """
    if path.is_dir():
        found = json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in _shards_in(path)}
        if found["shards"] != sizes:
            raise ValueError(f"it holds the shards {sizes} and was left with {found['shards']}")
        tensors = load_shards(path, like, is_alone=processes.size == 1)
        return Checkpoint(step=found["step"], tensors=tensors, state=found["state"])
    step, state = _read_file(path)
    if processes.size > 1:
        tensors = load_shards(path.parent, like, is_alone=False)
        return Checkpoint(step=step, tensors=tensors, state=state)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Checkpoint(step=step, tensors=tensors, state=state)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, processes: ProcessGroup) -> None:
    """Write a checkpoint, then take earlier ones away.

    Raises OSError where that fails; the earlier one is then intact.
    """
    if processes.size == 1:
        metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
        write_tensors(folder / CHECKPOINT_NAME, checkpoint.tensors, metadata)
        _remove_folders(folder, but=None)
        return
    path = folder / _FOLDER.format(checkpoint.step)
    part = path.with_name(f".{path.name}.part")
    if processes.is_first:
        remove(part)
        part.mkdir()
    processes.wait()
    save_shards(part, checkpoint.tensors)
    if processes.is_first:
        shards = {name: (part / name).stat().st_size for name in _shards_in(part)}
        state = {"step": checkpoint.step, "state": checkpoint.state, "shards": shards}
        write_json(part / _STATE_NAME, state)
        remove(path)
        os.replace(part, path)
        _remove_folders(folder, but=path)
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    processes.wait()


def _read_file(path: Path) -> tuple[int, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return int(metadata["step"]), json.loads(metadata["state"])


def _shards_in(path: Path) -> list[str]:
    return sorted(shard.name for shard in path.glob("*.safetensors"))


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _remove_folders(folder: Path, *, but: Path | None) -> None:
    for path in folder.glob("*checkpoint-*"):
        if path.is_dir() and path != but:
            remove(path)


_EARLIER = "checkpoint_before_"


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
    """

    def __init__(self, folder: Path, delay: int | None, processes: ProcessGroup) -> None:
        """delay: rows of metrics within which a fault is found, its first row included.

        None: no fault is looked for, and one checkpoint is enough.
        """
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
        """Return the last checkpoint; see `read_checkpoint`."""
        checkpoint = read_checkpoint(self.path, like, self.processes)
        self._step = checkpoint.step
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; drop those that no fault can lead back to."""
        if self._delay is not None:
            with self.processes.in_turn():
                if self.processes.is_first and (path := self.path):
                    path.replace(path.with_name(f"{_EARLIER}{self._step}{path.suffix}"))
        write_checkpoint(self.folder, checkpoint, self.processes)
        self._step = checkpoint.step
        if self.processes.is_first:
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
        with self.processes.in_turn():
            if not self.processes.is_first:
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
        if self.processes.is_first:
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
