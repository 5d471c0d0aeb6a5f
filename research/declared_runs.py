"""Runs that a study declares: settings become flags, flags a process and a folder of its own."""

import contextlib
import dataclasses
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import REPOSITORY

ROW_NAME = "row.json"
"""In a run's folder: what is known of it when it is done."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training: the flags by which it differs from others, its seed, its folder."""

    flags: str
    seed: int
    folder: Path


def place_runs(settings: Mapping[str, Any], seeds: Iterable[int], folder: Path) -> list[Run]:
    """Return a run for each seed, in a folder called after its flags: equal settings share one."""
    flags = " ".join(to_flags(settings))
    key = re.sub(r"[^\w.,]+", "-", flags).strip("-")
    return [Run(flags=flags, seed=seed, folder=folder / key / f"seed-{seed}") for seed in seeds]


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, by the names of a config's fields, as the words of a command line."""
    words = []
    for name, value in sorted(settings.items()):
        words.append(f"--{name.replace('_', '-')}")
        words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def run_module(module: str, words: Sequence[object], started: list[subprocess.Popen]) -> str | None:
    """Run `python -m module words` to its end; return its error's last line, or None.

    started: gets the process, for `stopped_with`.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    how = {"cwd": REPOSITORY, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **how, text=True)
    started.append(process)
    _, errors = process.communicate()
    if not process.returncode:
        return None
    return (errors.strip().splitlines() or ["it failed"])[-1]


@contextlib.contextmanager
def stopped_with(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Ask processes to stop when the block is left early, as by SIGTERM, which they do not get."""
    try:
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise


def list_cards(device: str) -> list[str]:
    """Return all devices of a kind, "cpu" or "cuda": every GPU, such as "cuda:1", or the CPU."""
    if device != "cuda":
        return ["cpu"]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def summarize(runs: Sequence[Row]) -> Row:
    """Return the mean over the finished seeds, and the spread, of every number.

    runs: one a seed, each with measures or with an `error`. `seeds` counts those with measures,
    `failed` the others. A measure that one of the seeds lacks, or that is not finite there, is left
    out: a mean over the rest would look better than the row is. The spread is the sample standard
    deviation.
    """
    whole = [run for run in runs if "error" not in run]
    row: Row = {"seeds": len(whole)}
    if errors := [run["error"] for run in runs if "error" in run]:
        row |= {"failed": len(errors), "error": errors[0]}
    for column in dict.fromkeys(key for run in whole for key in run if key != "seed"):
        values = [run.get(column) for run in whole]
        if all(isinstance(x, int | float) and math.isfinite(x) for x in values):
            row[column] = statistics.fmean(values)
            if len(values) > 1:
                row[f"{column}_spread"] = statistics.stdev(values)
    return row
