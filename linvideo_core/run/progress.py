"""Progress bars in a terminal, and log lines between them."""

import contextlib
import logging

from tqdm import tqdm

from .callbacks import Callbacks, Stage

_WORDS: dict[str, str] = {
    "encoding_prompts": "encoding the prompts",
    "sampling_teacher": "sampling the teacher",
    "filling_pool": "spreading the videos of the pool",
    "warm_start": "warm start",
    "ranking_layers": "ranking the layers",
    "training": "training",
    "distillation": "distillation",
    "evaluation": "sampling",
}


class LogHandler(logging.StreamHandler):
    """Writes the log to stderr, each line on one of its own, also while a bar is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take the bars away, write the line, draw them again below it."""
        is_drawn = any(bar.fp == self.stream for bar in getattr(tqdm, "_instances", ()))
        with tqdm.external_write_mode(file=self.stream):
            # What is no terminal keeps what was drawn: the bar's line ends there.
            if is_drawn and not self.stream.isatty():
                self.stream.write("\n")
            super().emit(record)


class TerminalCallbacks(Callbacks, contextlib.AbstractContextManager):
    """Draws a bar for each stage, with rate, time left and metrics; a context manager."""

    def __init__(self, *, is_shown: bool = True) -> None:
        """is_shown: False draws nothing, as all processes of a group but the first should."""
        self._is_shown = is_shown
        self._bar: tqdm | None = None

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        """Close the bar of the stage before and begin another."""
        self.close()
        # What an earlier run finished must not count in the rate.
        words = f"{_WORDS.get(stage, stage)}{detail and f' ({detail})'}"
        options = {"dynamic_ncols": True, "disable": not self._is_shown}
        self._bar = tqdm(desc=words, total=total, initial=done, **options)

    def on_step_end(self, done: int, **metrics: float) -> None:
        """Move the bar; a stage that is done ends its line."""
        if self._bar is None:
            return
        shown = {name: f"{value:.4g}" for name, value in metrics.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= self._bar.total:
            self.close()

    def close(self) -> None:
        """Leave the current bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *_: object) -> None:
        self.close()
