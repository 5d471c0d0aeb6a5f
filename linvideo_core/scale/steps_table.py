"""What times of training steps mean: a speed-up over one GPU, GPU hours of the paper's steps."""

from collections.abc import Sequence
from typing import Any

from ..selection import SelectionConfig

PHASES = ("selecting", "hardened")

# The paper's length of a transfer, and of it the share that `transfer` spends choosing layers.
PUBLISHED_STEPS = 3000
_SELECTION_SHARE = SelectionConfig().selection_share

_WAY = ("trained", "frozen", "offloaded", "recomputed", "compiled", "cap_gb")
_KEY = ("model", "resolution", "gpus", "phase", *_WAY)


def compare_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each kind, with its speed-up over one GPU: in videos a second."""
    last = {tuple(row[name] for name in _KEY): row for row in rows}
    compared = []
    for row in last.values():
        alone = last.get(tuple(1 if name == "gpus" else row[name] for name in _KEY))
        speedup = None
        if alone is not None:
            pace, pace_alone = (r["gpus"] * r["batch_per_gpu"] / r["seconds"] for r in (row, alone))
            speedup = pace / pace_alone
        compared.append({**row, "speedup": speedup})
    return compared


def count_hours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the GPU hours of the paper's steps for every way to train with both phases."""
    names = [name for name in _KEY if name != "phase"]
    kinds: dict[tuple, dict[str, float]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[n] for n in names), {})[row["phase"]] = row["seconds"]
    found = []
    for key, seconds in kinds.items():
        if len(seconds) == len(PHASES):
            kind = dict(zip(names, key, strict=True))
            share = _SELECTION_SHARE
            step = share * seconds["selecting"] + (1 - share) * seconds["hardened"]
            found.append({**kind, "gpu_hours": kind["gpus"] * PUBLISHED_STEPS * step / 3600})
    return found
