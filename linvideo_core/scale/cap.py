"""A GPU with less memory than it has: what fits another card is shown by what fits a cap."""

import contextlib
from collections.abc import Iterator

import torch

from ..memory import number_of_gpu

GB = 2**30
"""Bytes of a GB as cards are sold by it, and as PyTorch says what is in use."""

LOWER_STEPS = "give --frozen fp8, more --offload-blocks or a lower --batch-per-gpu"
"""What makes a step need less."""


@contextlib.contextmanager
def capped(device: str, cap_gb: float | None) -> Iterator[None]:
    """Let PyTorch's allocator give out no more than so much of a GPU's memory for a while.

    Raises ValueError, in one sentence, where more is asked for, and where it cannot be capped.
    """
    if cap_gb is None:
        yield
        return
    if not device.startswith("cuda"):
        raise ValueError(
            f"--cap-gb {cap_gb:g} given on {device}; a GPU's memory alone can be capped"
        )
    total = torch.cuda.mem_get_info(device)[1]
    if cap_gb * GB > total:
        raise ValueError(f"--cap-gb {cap_gb:g} given; {device} has {total / GB:.1f} GB in all")
    index = number_of_gpu(device)
    torch.cuda.set_per_process_memory_fraction(cap_gb * GB / total, index)
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(device) / GB
        raise ValueError(
            f"--cap-gb {cap_gb:g} is too little: {peak:.1f} GB were in use when more was asked "
            f"for; {LOWER_STEPS}"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
