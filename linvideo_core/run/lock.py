"""One process at a time works in a run folder: a lock that dies with the process that holds it."""

import contextlib
import datetime
import itertools
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import SettingError
from .files import LOCK_NAME, sweep
from .process_group import SINGLE_PROCESS, ProcessGroup

try:
    import fcntl
except ImportError:
    import msvcrt

logger = logging.getLogger(__name__)

# Windows keeps others from reading what is locked: not where the holder's name stands.
_LOCKED_BYTE = 2**20
_WAIT_SECONDS = 0.2


@contextlib.contextmanager
def locked(folder: Path, processes: ProcessGroup = SINGLE_PROCESS) -> Iterator[None]:
    """Keep every other run out of a run folder while the context lasts.

    The folder is made, and goes again where nothing came into it. Of several processes the first
    one holds the lock for all. What an earlier process that died has left half written is taken
    away.

    Raises SettingError saying who is at work there.
    """
    if not processes.is_first:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    try:
        with path.open("a+", encoding="utf-8") as file:
            _lock(file, path)
            sweep(folder, is_alone=True)
            try:
                yield
            finally:
                # Windows removes no file that is open: there it stays, and locks nothing.
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody works in a folder, and keep others out while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            try:
                stack.enter_context(locked(folder))
                break
            except SettingError as error:
                if attempt == 0:
                    logger.info("waiting: %s", error)
            time.sleep(_WAIT_SECONDS)
        yield


def _lock(file: IO[str], path: Path) -> None:
    try:
        if os.name == "nt":
            os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError("its holder took it away as it ended")
    except (BlockingIOError, FileNotFoundError, PermissionError) as error:
        file.seek(0)
        raise SettingError(
            f"{path.parent} is in use by {file.read(200).strip() or 'another process'}: wait for "
            "it or end it, or choose another {out}",
            "out",
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second run there", path.parent, error)
    file.seek(0)
    file.truncate()
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} of {platform.node()} since {now}\n")
    file.flush()
