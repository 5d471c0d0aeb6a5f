"""The GPU's clock and scales: medians of queued runs, peaks of allocated memory, copy bandwidth.

How a time is taken. Runs are queued behind a kernel that only spins, so that the GPU never waits
for Python: between two events lie the kernels of one call, back to back, as in a busy model. A
call is queued again, behind a longer spin, where the GPU did reach it before Python was done.
Before each run a buffer larger than the L2 cache is overwritten. The buffer's lines that are
still to be written back burden the run as much as its own lines, left in the cache, relieve it.
"""

import statistics
from collections.abc import Callable, Sequence
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
_FIRST_SPIN, _LONGEST_SPIN = 2 * 10**6, 2 * 10**8


class Instruments(Protocol):
    """What a measurement needs: a clock and scales for the machine that runs it."""

    def milliseconds(self, call: Call) -> float:
        """Return the median time of a call."""
        ...

    def extra_mb(self, call: Call) -> float:
        """Return the peak of memory during a call, beyond what was there and what it returns."""
        ...


class CudaInstruments:
    """Instruments of the current CUDA device."""

    def __init__(self, *, runs: int, seconds: float) -> None:
        """Take the median of `runs` runs, or of those that fit into `seconds`, at least 3."""
        self._runs, self._seconds = runs, seconds
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
        self._spin = _FIRST_SPIN

    def milliseconds(self, call: Call) -> float:
        """Return the median time of a call that was made before, so that nothing compiles."""
        once = self._time_runs(call, 1)[0]
        fitting = int(1000 * self._seconds / max(once, 1e-3))
        return statistics.median(self._time_runs(call, max(_FEWEST_RUNS, min(self._runs, fitting))))

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
            if not is_late or self._spin >= _LONGEST_SPIN:
                return [start.elapsed_time(end) for start, end in events]
            self._spin *= 2


def measure_copy_bandwidth(
    instruments: Instruments, device: torch.device | str, num_copied: int = NUM_COPIED
) -> float:
    """Return the bytes per second, read and written, of a plain copy of bf16 on the device."""
    source = torch.randn(num_copied, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = instruments.milliseconds(lambda: target.copy_(source))
    return 2 * source.nbytes / (milliseconds / 1000)
