"""How much memory a process takes at its peak, and a card that is made as small as another."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

GB = 2**30
"""Bytes of a GB as cards are sold by it."""

_EVERY_SECONDS = 0.1


@dataclasses.dataclass
class Peak:
    """The largest number of bytes that was seen, in GB of 2^30; None where nothing can be read."""

    gb: float | None = None


@contextlib.contextmanager
def watching(read: Callable[[], int | None]) -> Iterator[Peak]:
    """Read memory ten times a second while a block runs."""
    peak, is_done = Peak(), threading.Event()

    def poll() -> None:
        while True:
            if (num_bytes := read()) is not None:
                peak.gb = max(peak.gb or 0.0, num_bytes / GB)
            if is_done.wait(_EVERY_SECONDS):
                return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_done.set()
        thread.join()


def used_on_gpu() -> int:
    """Return the bytes of the GPU that all processes together use now."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident(process_id: int) -> int | None:
    """Return the bytes of CPU memory of a process; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * found[0] if found else None


@contextlib.contextmanager
def smaller_card(free_gb: float | None) -> Iterator[None]:
    """Take so much of the GPU that what is free is as on a smaller card; None: take nothing.

    Whatever allocates there, PyTorch or a host's own memory, then meets the end of the card.

    Raises ValueError where the GPU has less than that free.
    """
    if free_gb is None:
        yield
        return
    free, _ = torch.cuda.mem_get_info()
    taken = free - int(free_gb * GB)
    if taken < 0:
        raise ValueError(f"{free_gb:g} GB are to be left free and the GPU has {free / GB:.1f}")
    taken_memory = torch.empty(taken, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del taken_memory
        torch.cuda.empty_cache()
