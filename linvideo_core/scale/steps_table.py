"""What times of training steps mean: a speed-up over one GPU, GPU hours of the paper's steps.

A run is `{command, rows}`: what was typed, and a row for each phase that it measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..selection import SelectionConfig

PHASES = ("selecting", "hardened")

# The paper's length of a transfer, and of it the share that `transfer` spends choosing layers.
PUBLISHED_STEPS = 3000
_SELECTION_SHARE = SelectionConfig().selection_share

_WAY = ("trained", "frozen", "offloaded", "recomputed", "compiled", "cap_gb")
_KEY = ("model", "resolution", "gpus", "phase", *_WAY)


def keep_last(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return runs with the rows that no later one has measured again; without rows, it is gone."""
    kept, seen = [], set()
    for run in reversed(runs):
        rows = [row for row in run["rows"] if _key(row) not in seen]
        seen.update(map(_key, rows))
        if rows:
            kept.append({**run, "rows": rows})
    return kept[::-1]


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give each row its speed-up over the one of its kind on one GPU: in videos a second."""
    by_key = {_key(row): row for row in rows}
    compared = []
    for row in rows:
        alone = by_key.get(_key({**row, "gpus": 1}))
        speedup = None
        if alone is not None:
            pace, pace_alone = (r["gpus"] * r["batch_per_gpu"] / r["seconds"] for r in (row, alone))
            speedup = pace / pace_alone
        compared.append({**row, "speedup": speedup})
    return compared


def count_hours(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the GPU hours of the paper's steps for every way to train with both phases."""
    names = [name for name in (*_KEY, "batch_per_gpu") if name != "phase"]
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


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in _KEY)
