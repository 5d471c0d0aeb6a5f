"""How a long computation says where it stands; what is drawn of it is the caller's business."""

import contextlib
from types import TracebackType
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Receives the state of a stage: `done` of `total` units, and figures worth watching."""

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None: ...


def silent(stage: str, done: int, total: int, **metrics: float) -> None:
    """Draw nothing."""


class TqdmProgress(contextlib.AbstractContextManager):
    """A terminal bar for each stage, with rate, time left and metrics; a context manager."""

    def __init__(self, *, is_shown: bool = True) -> None:
        """is_shown: False draws nothing, as one of many processes that do the same should."""
        self._is_shown = is_shown
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """Move the bar of a stage; a new stage closes the bar of the one before.

        Saying more than once that a stage is done draws it once.
        """
        if not self._is_shown:
            return
        is_closed = self._bar is None and stage == self._stage
        if is_closed and done >= total:
            return
        if self._bar is None or stage != self._stage:
            self.close()
            # A resumed stage starts part-way: what an earlier run did must not count in the rate.
            self._bar = tqdm(desc=stage, total=total, initial=max(done - 1, 0), dynamic_ncols=True)
            self._stage = stage
        self._bar.total = total
        self._bar.set_postfix(
            {name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False
        )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave the current bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
