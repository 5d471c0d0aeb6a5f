"""Clocks and scales of the GPU and the CPU: medians of runs, peaks of memory, copy bandwidth.

How a time is taken on a GPU. Runs are queued behind a kernel that only spins, so that the GPU never
waits for Python: between two events lie the kernels of one call, back to back, as in a busy model.
A call is queued again, behind a longer spin, where the GPU did reach it before Python was done.
Before each run a buffer larger than the L2 cache is overwritten. The buffer's lines that are
still to be written back burden the run as much as its own lines, left in the cache, relieve it.
"""

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

METHOD = (
    "median of CUDA events around single calls, queued behind a spinning kernel so that the GPU "
    "never waits for Python; no CUDA graphs; before each a buffer of 256 MB is overwritten, which "
    "empties the L2 cache; first call excluded; random data"
)

NUM_COPIED = 2**30

Call = Callable[[], Tensor | Sequence[Tensor]]

_MEGABYTE = 2**20
_FLUSHED_BYTES = 256 * _MEGABYTE
_FEWEST_RUNS = 3
# About a millisecond at first, and at most a tenth of a second.
_FIRST_SPIN, LONGEST_SPIN = 2 * 10**6, 2 * 10**8
_M_MMAP_THRESHOLD = -3


class Instruments(Protocol):
    """What a measurement needs: a clock and scales for the machine that runs it."""

    def milliseconds(self, call: Call) -> float:
        """Return the median time of a call that was made before, so that nothing compiles."""
        ...

    def once(self, call: Call) -> float:
        """Return the milliseconds of one call that is too long to be repeated."""
        ...

    def extra_mb(self, call: Call) -> float:
        """Return the peak of memory during a call, beyond what was there and what it returns."""
        ...


class CudaInstruments:
    """Instruments of the current CUDA device."""

    def __init__(self, *, runs: int, seconds: float, spin: int = _FIRST_SPIN) -> None:
        """Take the median of `runs` runs, or of those that fit into `seconds`, at least 3.

        spin: clock ticks before each run; at LONGEST_SPIN no run is ever made again.
        """
        self._runs, self._seconds = runs, seconds
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
        self._spin = spin

    def milliseconds(self, call: Call) -> float:
        """Return the median time of a call that was made before, so that nothing compiles."""
        first = self._time_runs(call, 1)
        fitting = int(1000 * self._seconds / max(first[0], 1e-3))
        if fitting <= _FEWEST_RUNS:
            # Long calls are not made once more than is needed.
            return statistics.median(first + self._time_runs(call, _FEWEST_RUNS - 1))
        return statistics.median(self._time_runs(call, max(_FEWEST_RUNS, min(self._runs, fitting))))

    def once(self, call: Call) -> float:
        """Return the milliseconds of one call that is too long to be repeated."""
        return self._time_runs(call, 1)[0]

    def extra_mb(self, call: Call) -> float:
        """Return the peak of allocated memory beyond what was there and what the call returns."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        tensors = [returned] if isinstance(returned, Tensor) else returned
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        return max(0, peak - sum(x.nbytes() for x in storages.values())) / _MEGABYTE

    def _time_runs(self, call: Call, runs: int) -> list[float]:
        while True:
            is_late = False
            events = []
            for _ in range(runs):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                torch.cuda._sleep(self._spin)
                start.record()
                call()
                end.record()
                is_late |= start.query()
                events.append((start, end))
            torch.cuda.synchronize()
            if not is_late or self._spin >= LONGEST_SPIN:
                return [start.elapsed_time(end) for start, end in events]
            self._spin *= 2


class CpuInstruments:
    """Instruments of this process on the CPU."""

    def __init__(self, *, runs: int, seconds: float) -> None:
        """Take the median of `runs` runs, or of those that fit into `seconds`."""
        self._runs, self._seconds = runs, seconds

    def milliseconds(self, call: Call) -> float:
        """Return the median time of a call; the first run is left out where there are more."""
        times: list[float] = []
        while len(times) <= self._runs and sum(times) < 1000 * self._seconds:
            times.append(self.once(call))
        return statistics.median(times[1:] or times)

    def once(self, call: Call) -> float:
        """Return the milliseconds of one call."""
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)

    def extra_mb(self, call: Call) -> float:
        """Return by how much a call raises the peak of resident memory, its result included.

        Exact once in a process: memory that an earlier call freed could be used again unseen.
        """
        free_at_once()
        before = _reset_peak_memory()
        call()
        return (_peak_memory() - before) / _MEGABYTE


def free_at_once() -> None:
    """Make glibc hand freed tensors back to the system, so that holes in its heap do not count."""
    if sys.platform == "linux":
        # Other C libraries have no mallopt.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _reset_peak_memory() -> int:
    """Return the peak of resident memory so far, on Linux lowered first to what is in use now."""
    if sys.platform == "linux":
        # A container may forbid it: the peak so far is then a little above what is in use.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """Return this process's peak of resident memory in bytes."""
    if sys.platform == "linux":
        # Unlike ru_maxrss, VmHWM follows a reset.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_copy_bandwidth(
    instruments: Instruments, device: torch.device | str, num_copied: int = NUM_COPIED
) -> float:
    """Return the bytes per second, read and written, of a plain copy of bf16 on the device."""
    source = torch.randn(num_copied, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = instruments.milliseconds(lambda: target.copy_(source))
    return 2 * source.nbytes / (milliseconds / 1000)
