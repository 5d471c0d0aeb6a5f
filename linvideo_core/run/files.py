"""Write files so that an interrupted or failed write never harms what was there before."""

import contextlib
import fnmatch
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import SettingError

LOCK_NAME = ".lock"
"""In a run's folder while a process works there."""
DIGEST = "digest"
"""In the metadata of a file: what tells damage."""

# A folder: writers may make temporary files of their own beside what they are told to write.
_PART = ".linvideo-{}.part"
_SECONDS_UNTIL_DEAD = 3600
"""After which a file that was being written, and did not grow since, belongs to no process."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if the block succeeds.

    The file gets the permissions of any new file, whatever the writer makes of them.

    Raises OSError, naming the file and saying that the earlier one is intact, if writing fails.
    """
    folder = path.parent / _PART.format(secrets.token_hex(8))
    temporary = folder / path.name
    try:
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        # Some network and FAT drives have no permissions to set.
        with contextlib.suppress(OSError):
            temporary.chmod(mode)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}); the earlier file, if any, is intact: free some "
            "space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, *, is_alone: bool = False) -> None:
    """Take away what processes that died while they wrote have left in a folder or below it.

    is_alone: whether nobody else writes there; else, and where another run has its lock below, only
        what is an hour old goes.
    """
    oldest = time.time() - _SECONDS_UNTIL_DEAD
    for path in find_below(folder, _PART.format("*")):
        below = list(path.relative_to(folder).parents)[:-1]
        with contextlib.suppress(OSError):
            is_own = is_alone and not any((folder / at / LOCK_NAME).exists() for at in below)
            if is_own or path.stat().st_mtime < oldest:
                remove(path)


def find_below(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield all files and folders below a folder whose name matches, while others write there.

    Path.rglob fails where a folder is taken away that it has just seen.
    """
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in fnmatch.filter([*folders, *files], pattern))


def remove(path: Path) -> None:
    """Take away a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_space(needs: Sequence[tuple[Path, int, str]]) -> None:
    """Raise SettingError when a disk has too little room for all that is to come.

    needs: a folder, which may not exist yet, bytes, and what they are.
    """
    by_disk: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, num_bytes, what in needs:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        by_disk.setdefault(place.stat().st_dev, []).append((place, num_bytes, what))
    for found in by_disk.values():
        place, free = found[0][0], shutil.disk_usage(found[0][0]).free
        if (total := sum(num_bytes for _, num_bytes, _ in found)) > free:
            what = " and ".join(what for *_, what in found)
            raise SettingError(
                f"{what} take {total / 1e9:,.1f} GB and the disk of {place} has "
                f"{free / 1e9:,.1f} GB left: free some, or give {{out}} or "
                "{teacher_folder} on another disk",
                "out",
                "teacher_folder",
            )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as indented JSON; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=1) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))


def digest_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return 32 hex digits that tell tensors on the CPU and texts from others."""
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_with_digest(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically, with a digest of tensors on the CPU and of metadata."""
    digest = digest_of(tensors, *_in_order(metadata))
    write_tensors(path, tensors, {**metadata, DIGEST: digest})


def is_as_written(path: Path) -> bool:
    """Say whether a file is what `write_with_digest` wrote; OSError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return metadata.get(DIGEST) == digest_of(load_file(path), *_in_order(metadata))
    except (SafetensorError, ValueError, RuntimeError, KeyError):
        return False


def _in_order(metadata: Mapping[str, str]) -> list[str]:
    return [text for pair in sorted(metadata.items()) if pair[0] != DIGEST for text in pair]
