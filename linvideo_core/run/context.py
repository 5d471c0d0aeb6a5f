"""What every stage of a command is handed besides its own settings."""

import dataclasses
from pathlib import Path

from .callbacks import Callbacks
from .process_group import SINGLE_PROCESS, ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how one run of a command computes.

    folder: where it keeps what it makes.
    device: such as "cpu" or "cuda:1"; precision: of matrix products, "fp32" or "bf16".
    seed: of everything random.
    callbacks: told where the run stands.
    processes: that compute it together.
    """

    folder: Path
    device: str
    precision: str
    seed: int = 0
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    processes: ProcessGroup = SINGLE_PROCESS
