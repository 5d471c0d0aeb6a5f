"""Cases from seeds, and a process of its own that reads them and is watched."""

import contextlib
import multiprocessing
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from .damage import MOST_BYTES, damage
from .kinds import KINDS, WrongError

_SECONDS, _SPARE, _TIMES = 30, 2**26, 8


def make_case(kind: str, seed: int, folder: Path) -> None:
    """Write files of a kind into a new folder, copied from beside it, and damage one of them."""
    whole = folder.with_name(f"{kind}-whole")
    if not whole.exists():
        whole.mkdir()
        KINDS[kind][0](whole)
    shutil.copytree(whole, folder)
    draw = random.Random(f"{kind} {seed}")
    damage(draw.choice(sorted(path for path in folder.rglob("*") if path.is_file())), draw)


def judge(kind: str, folder: Path) -> tuple[str, str]:
    """Read the files of a case; return as what it counts, and why."""
    held = sum(min(p.stat().st_size, MOST_BYTES) for p in folder.rglob("*") if p.is_file())
    before = _begin_measuring()
    try:
        KINDS[kind][1](folder)
        found = "accepted_benign", ""
    except WrongError as error:
        found = "accepted_wrong", str(error)
    except (ValueError, OSError) as error:
        found = "refused" if is_sentence(error) else "crashed", str(error)[:2000]
    except Exception as error:
        found = "crashed", f"{type(error).__name__}: {error}"[:2000]
    grown = _measure("VmHWM") - before
    if grown > _SPARE + _TIMES * held:
        return "grew", f"by {grown / 2**20:.0f} MB for {held / 2**20:.1f} MB; {found}"
    return found


def is_sentence(error: Exception) -> bool:
    """Say whether an error's words are one line that a reader can take in."""
    words = str(error)
    return (
        words.isprintable() and 0 < len(words) < 1200 and not re.search(r"\[Errno|Error\(", words)
    )


def _begin_measuring() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _measure("VmRSS")


def _measure(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def _serve(connection: Any, folder: Path) -> None:
    """Take cases, one after the other, until the watching process goes."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        connection.send("ready")
        while True:
            kind, seed = connection.recv()
            case = folder / "case"
            make_case(kind, seed, case)
            connection.send(judge(kind, case))
            shutil.rmtree(case)


class Reader:
    """The process that reads; another one once it hung or died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.folder), daemon=True)
        self._process.start()
        theirs.close()
        # PyTorch is imported by then.
        self._connection.recv()

    def read(self, kind: str, seed: int) -> tuple[str, str]:
        """Return as what a case counts, and why."""
        self._connection.send((kind, seed))
        try:
            if self._connection.poll(_SECONDS):
                return self._connection.recv()
            found = "hung", f"no answer in {_SECONDS} s"
        except EOFError:
            found = "crashed", "the process died"
        self.close()
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        self._start()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
