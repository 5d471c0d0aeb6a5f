"""Where a training's state lies: one file of a process alone, or a folder of a team's shards.

Both hold the same tensors by the same names, and either is read by any number of processes. They
are safetensors and JSON: nothing is unpickled. A folder is renamed into place once it is whole; the
run folder is its user's own, and whoever may write there may change what training continues from.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .parallel import load_shards, save_shards
from .storage import remove, write_json, write_tensors
from .team import Team

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
    """Return how a checkpoint of a process alone, or of a team, is called in its folder."""
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


def read_checkpoint(path: Path, like: Mapping[str, Tensor], team: Team) -> Checkpoint:
    """Read what `find_checkpoint` found.

    like: the parameters by name; a team's tensors become shards as theirs.

    Raises ValueError, KeyError or SafetensorError for one that is damaged.
    """
    if path.is_dir():
        found = json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in _shards_in(path)}
        if found["shards"] != sizes:
            raise ValueError(f"it holds the shards {sizes} and was left with {found['shards']}")
        tensors = load_shards(path, like, is_alone=team.size == 1)
        return Checkpoint(step=found["step"], tensors=tensors, state=found["state"])
    step, state = _read_file(path)
    if team.size > 1:
        tensors = load_shards(path.parent, like, is_alone=False)
        return Checkpoint(step=step, tensors=tensors, state=state)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Checkpoint(step=step, tensors=tensors, state=state)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, team: Team) -> None:
    """Write a checkpoint, then take earlier ones away.

    Raises OSError where that fails; the earlier one is then intact.
    """
    if team.size == 1:
        metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
        write_tensors(folder / CHECKPOINT_NAME, checkpoint.tensors, metadata)
        _remove_folders(folder, but=None)
        return
    path = folder / _FOLDER.format(checkpoint.step)
    part = path.with_name(f".{path.name}.part")
    if team.is_first:
        remove(part)
        part.mkdir()
    team.wait()
    save_shards(part, checkpoint.tensors)
    if team.is_first:
        shards = {name: (part / name).stat().st_size for name in _shards_in(part)}
        state = {"step": checkpoint.step, "state": checkpoint.state, "shards": shards}
        write_json(part / _STATE_NAME, state)
        remove(path)
        os.replace(part, path)
        _remove_folders(folder, but=path)
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    team.wait()


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
