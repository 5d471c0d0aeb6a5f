"""What every stage of a command is handed besides its own settings."""

import dataclasses
from pathlib import Path

from .callbacks import Callbacks, Stage
from .process_group import SINGLE_PROCESS, ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how one run of a command computes.

    folder: where it keeps what it makes.
    device: such as "cpu" or "cuda:1"; precision: of matrix products, "fp32" or "bf16".
    seed: of everything random.
    callbacks: told where the run stands.
    processes: that compute it together.
    detail: tells its stages from those of another run that shares its callbacks.
    """

    folder: Path = Path()
    device: str = "cpu"
    precision: str = "fp32"
    seed: int = 0
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    processes: ProcessGroup = SINGLE_PROCESS
    detail: str = ""

    def below(self, name: str) -> "Run":
        """Return the same run in a folder below its own."""
        return dataclasses.replace(self, folder=self.folder / name)

    def begin_stage(self, stage: Stage, total: int, done: int = 0) -> None:
        """Announce a stage of `total` units, of which an earlier call finished `done`."""
        self.callbacks.on_stage(stage, total, done, self.detail)
