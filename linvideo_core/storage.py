"""Write files so that an interrupted or failed write never harms what was there before."""

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if the block succeeds.

    The file gets the permissions of any new file, whatever the writer makes of them.

    Raises OSError, naming the file and saying that the earlier one is intact, if writing fails.
    """
    temporary = path.parent / f".linvideo-{secrets.token_hex(8)}.part"
    try:
        temporary.touch(exist_ok=False)
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
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Take away a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_space(folder: Path, num_bytes: int, what: str, advice: str) -> None:
    """Raise ValueError, in one sentence, when the disk of a folder has too little room for `what`.

    folder: may not exist yet. advice: what would need less.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ValueError(
            f"{what} take {num_bytes / 1e9:,.1f} GB and {place} has {free / 1e9:,.1f} GB of free "
            f"space: free some, {advice}, or choose a folder on another disk"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as indented JSON; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
