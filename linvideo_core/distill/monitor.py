"""Tell a distillation that is going wrong from its metrics alone, before its result is lost.

Adversarial training of generator and critic can spike, fall onto a few videos, or stand still:
slow motion is the known flaw of distilled video models.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

_MEMORY = 50
_NEEDED = 10
_RECENT = 5
_SPIKE = 10.0
_COLLAPSED = 0.5
_WORDS = {
    "spread_ratio": "videos became alike: their variety",
    "motion_ratio": "videos came to a halt: their motion",
}


class TrainingMonitor:
    """What `fit` asks of every row of metrics; its memory is the rows.

    A spike: the critic's loss, median of the last 5 rows, is over 10 times its running median.
    A collapse: variety or motion, as shares of the teacher's, median of the last 5 rows, fall under
    half of the largest such median so far, as far as that was no more than the teacher's.
    """

    delay = _RECENT

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._recent = {name: deque(maxlen=_RECENT) for name in ("critic_loss", *_WORDS)}
        self._best = dict.fromkeys(_WORDS, 0.0)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Return what is wrong after this row, in a part of a sentence, or None."""
        faults = [self._find_spike(row), *(self._find_collapse(name, row) for name in _WORDS)]
        return next((fault for fault in faults if fault), None)

    def _find_spike(self, row: Mapping[str, Any]) -> str | None:
        usual = statistics.median(self._losses) if len(self._losses) >= _NEEDED else None
        self._losses.append(row["critic_loss"])
        recent = self._read("critic_loss", row)
        if usual is None or recent is None or recent <= _SPIKE * usual:
            return None
        return f"the critic's loss rose from {usual:.3g} to {recent:.3g}"

    def _find_collapse(self, name: str, row: Mapping[str, Any]) -> str | None:
        recent = self._read(name, row)
        if recent is None:
            return None
        self._best[name] = best = max(self._best[name], min(recent, 1.0))
        if recent >= _COLLAPSED * best:
            return None
        return f"the {_WORDS[name]} fell from {best:.2f} to {recent:.2f} of the teacher's"

    def _read(self, name: str, row: Mapping[str, Any]) -> float | None:
        """Return the median of the last readings with this one, None before there are enough."""
        recent = self._recent[name]
        recent.append(row[name])
        return statistics.median(recent) if len(recent) == _RECENT else None
