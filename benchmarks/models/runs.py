"""The record, and its runs, each a size in a place: which replaces which, what makes them again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .sizes import SIZES
from .teachers import HeadlessSubject

RECORD_NAME = "scale.json"
RECORD_TITLE = "Whole models with random weights: denoiser calls, 50-step videos, training steps"

Run = Mapping[str, Any]


def merge_runs(
    earlier: Sequence[Run], new: Sequence[Run], facts: Mapping[str, Any], path: Path
) -> list[Run]:
    """Return the last run of each size and place, smaller sizes first.

    earlier: runs of the record at `path`; facts: what all of them must share with the new ones.

    Raises ValueError, in one sentence, where an earlier run that stays was made otherwise.
    """
    last = {(run["size"], run["where"]): run for run in (*earlier, *new)}
    for name, value in facts.items():
        for run in last.values():
            if run[name] != value:
                raise ValueError(
                    f"{path} has {run['size']} measured with {name} {run[name]}, and this is "
                    f"{value}; delete it and measure all sizes here, or write to another folder"
                )
    order = list(SIZES)
    return sorted(last.values(), key=lambda run: order.index(run["size"]))


def list_commands(runs: Sequence[Run], command: str, usual_shapes: str) -> Iterator[str]:
    """Yield what to type to measure runs again: one command for all that share their flags.

    usual_shapes: the sizes that the command measures where --shapes is not given.
    """
    for flags in dict.fromkeys(run["flags"] for run in runs):
        alike = [run for run in runs if run["flags"] == flags]
        shapes = ",".join(dict.fromkeys(run["size"] for run in alike))
        words = [command, flags]
        if shapes != usual_shapes:
            words.append(f"--shapes {shapes}")
        if any(run["where"] != HeadlessSubject.where for run in alike):
            # A path on one machine says nothing on another.
            words.append("--comfyui PATH")
        yield " ".join(word for word in words if word)
