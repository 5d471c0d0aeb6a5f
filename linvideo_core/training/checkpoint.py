"""The checkpoint of a training, and those before it for as long as a fault may come to light."""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..run.errors import shown_value
from ..run.files import DIGEST, digest_of, remove, write_json, write_tensors
from ..run.process_group import ProcessGroup
from ..run.reading import parse_json, read_json
from .fsdp import load_shards, save_shards

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.safetensors"
_FOLDER = "checkpoint-{:08d}"
# Without an ending: DCP reads all of a folder that ends in .safetensors.
_EARLIER = "checkpoint_before_"
_STATE_NAME = "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after `step` steps: its tensors by name, and its task's own state as JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder: a file, or a folder of shards."""
    shards = sorted(folder.glob(_FOLDER.format(0).replace("0" * 8, "[0-9]" * 8)))
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return shards[-1] if shards else None
    # Both: a process was stopped before it took the earlier one away.
    return shards[-1] if shards and _step_of(shards[-1]) > _step_of(path) else path


def finished_steps(folder: Path) -> int:
    """Return how many steps the newest checkpoint in a folder holds; 0 where none can be read."""
    path = find_checkpoint(folder)
    return 0 if path is None else _step_of(path)


def _step_of(path: Path) -> int:
    if path.is_dir():
        return int(path.name.rpartition("-")[2])
    try:
        return int(_read_texts(path)["step"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return 0


def _read_texts(path: Path) -> dict[str, str]:
    """Return what a checkpoint says beside its tensors: `step`, `state` in JSON, `digest`."""
    if path.is_dir():
        texts = read_json(path / _STATE_NAME)
        if not isinstance(texts, dict):
            raise ValueError(f"its {_STATE_NAME} holds none")
        return texts
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _check_whole(path: Path) -> None:
    """Raise ValueError where a checkpoint is not what was written."""
    texts = _read_texts(path)
    found = (texts["step"], texts["state"])
    digest = _digest_shards(path, *found) if path.is_dir() else digest_of(load_file(path), *found)
    if texts.get(DIGEST) != digest:
        raise ValueError("it is not what was written")


def _digest_shards(folder: Path, *texts: str) -> str:
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


class Monitor(Protocol):
    """What looks at a training's metrics while it runs.

    delay: rows within which a fault is found, its first row included.
    """

    delay: int

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Take a row in plain numbers; return what is wrong with the training, or None."""


class CheckpointFiles:
    """The last checkpoint in a folder and the one before it, should the last be damaged on disk.

    Where faults are looked for, all back to one that any fault comes after are there.

    Every process of a process group calls alike; the first one alone moves files.

    delay: see `Monitor`; None: no fault is looked for.
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
        """Return the last checkpoint; where that is damaged the one before it, which is logged.

        like: the parameters by name; a process group's tensors become shards as theirs.

        Raises OSError, ValueError, KeyError or SafetensorError where all are damaged.
        """
        with self.processes.in_turn():
            if self.processes.is_first:
                self._drop_damaged()
        path, is_alone = self.path, self.processes.size == 1
        texts = _read_texts(path)
        if is_alone and path.is_file():
            tensors = load_file(path)
        else:
            folder = path if path.is_dir() else self.folder
            tensors = load_shards(folder, like, is_alone=is_alone)
        self._step = int(texts["step"])
        return Checkpoint(step=self._step, tensors=tensors, state=parse_json(texts["state"]))

    def _drop_damaged(self) -> None:
        """Put the last checkpoint aside while it is damaged and one before it is there."""
        path = self.path
        try:
            _check_whole(path)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if not (earlier := self._earlier()):
                raise
            before, aside = max(earlier), path.with_name(f"{path.name}.damaged")
            logger.warning(
                "%s is damaged (%s): the one before it is taken, of step %d, and it is kept as %s",
                path,
                shown_value(error),
                before,
                aside.name,
            )
            remove(aside)
            path.replace(aside)
            self._put_back(before, earlier)
            self._drop_damaged()

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; drop those that no fault can lead back to.

        Raises OSError where that fails; the earlier one is then intact.
        """
        with self.processes.in_turn():
            if self.processes.is_first and (path := self.path):
                if self._delay is None:
                    # No more than two are on the disk at once.
                    self._remove_earlier()
                path.replace(path.with_name(f"{_EARLIER}{self._step}"))
        texts = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
        try:
            if self.processes.size == 1:
                self._write_file(checkpoint.tensors, texts)
            else:
                self._write_shards(checkpoint, texts)
        except OSError:
            if self.processes.is_first and (earlier := self._earlier()):
                self._put_back(max(earlier), earlier)
            raise
        self._step = checkpoint.step
        if self.processes.is_first and self._delay is not None:
            best = max(filter(self._is_good, self._earlier()), default=0)
            self._remove_earlier(before=best)

    def _write_file(self, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        digest = digest_of(tensors, *texts.values())
        write_tensors(self.folder / CHECKPOINT_NAME, tensors, {**texts, DIGEST: digest})
        self._remove_folders(but=None)

    def _write_shards(self, checkpoint: Checkpoint, texts: Mapping[str, str]) -> None:
        path = self.folder / _FOLDER.format(checkpoint.step)
        part = path.with_name(f".{path.name}.part")
        if self.processes.is_first:
            remove(part)
            part.mkdir()
        self.processes.wait()
        save_shards(part, checkpoint.tensors)
        if self.processes.is_first:
            digest = _digest_shards(part, *texts.values())
            write_json(part / _STATE_NAME, {**texts, DIGEST: digest})
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
        by_step = {path.name.removeprefix(_EARLIER): path for path in paths}
        return {int(step): path for step, path in by_step.items() if step.isdecimal()}

    def _is_good(self, step: int) -> bool:
        """Say whether a fault that is found in the last row began after `step` steps were taken."""
        return len(self._recent) == self._recent.maxlen and step <= self._recent[0]
