"""Time and memory of a call, on a GPU or a CPU."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

METHOD = (
    "triton.testing.do_bench: median of CUDA events around single calls, before each of which a "
    "buffer of 256 MB is overwritten, which empties the L2 cache; first call excluded; random data"
)
Call = Callable[[], Tensor | Sequence[Tensor]]

_MEGABYTE = 2**20
_CPU_RUNS = 7
_M_MMAP_THRESHOLD = -3


def milliseconds(call: Call, device: torch.device, seconds: float) -> float:
    """Return the median time of a short call that was made before, so that nothing compiles.

    seconds: for about how long it is repeated.
    """
    if device.type != "cuda":
        return median_of_runs(call, device, runs=_CPU_RUNS, seconds=seconds)
    from triton.testing import do_bench

    return do_bench(call, rep=max(1, int(1000 * seconds)), return_mode="median")


def median_of_runs(
    call: Call, device: torch.device, *, runs: int, seconds: float, fewest: int = 1
) -> float:
    """Return the median milliseconds of `runs` runs, or of those that fit into `seconds`.

    fewest: runs that are made however long they take.
    """
    times: list[float] = []
    while len(times) < fewest or (len(times) < runs and sum(times) < 1000 * seconds):
        times.append(time_once(call, device))
    return statistics.median(times)


def time_once(call: Call, device: torch.device) -> float:
    """Return the milliseconds of one call, until the device is done with it."""
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - started)


def extra_mb(call: Call, device: torch.device) -> float:
    """Return the peak of memory during a call beyond what was there before.

    On a GPU what the call returns does not count. On a CPU it does, and the process's resident
    memory is read (Linux alone; NaN elsewhere).
    """
    if device.type != "cuda":
        _free_at_once()
        before = _peak_memory(is_reset=True)
        call()
        return (_peak_memory() - before) / _MEGABYTE
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    tensors = [returned] if isinstance(returned, Tensor) else returned
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return max(0, peak - sum(x.nbytes() for x in storages.values())) / _MEGABYTE


def _free_at_once() -> None:
    """Make glibc hand freed tensors back to the system, those freed before and those to come.

    Else a call may fill holes of the heap that count as resident already.
    """
    # Other C libraries have neither.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(*, is_reset: bool = False) -> float:
    """Return this process's peak of resident memory in bytes; NaN where Linux does not tell.

    is_reset: it is lowered first to what is in use now.
    """
    # A container may forbid it: the peak so far is then a little above what is in use.
    with contextlib.suppress(OSError):
        if is_reset:
            Path("/proc/self/clear_refs").write_text("5")
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
