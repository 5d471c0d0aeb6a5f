"""Paired tests: two rows of a table that were run with the same seeds, compared seed by seed.

What a seed brings (noise, prompts, initial weights) is in both of its runs, and leaves with the
difference: a row can be better in every seed although its spread over seeds is wider than that.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MOST_SEEDS = 16
# Sums in another order differ by rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """How much larger a row is than its baseline, over the seeds that both have.

    difference: the mean over seeds.
    t: that over its standard error, of `seeds` - 1 degrees of freedom; None where the differences
        do not vary, or there is one alone.
    p: of the exact sign-flip test, two-sided: the share of all ways to swap row and baseline within
        seeds that differ by as much. It assumes no distribution, and cannot be less than `least_p`.
    """

    difference: float
    t: float | None
    p: float
    seeds: int


def compare_paired(row: Mapping[int, float], baseline: Mapping[int, float]) -> PairedTest | None:
    """Compare two rows' values by seed; None where they have no seed in common.

    Raises ValueError for over 16 seeds, whose ways to swap are too many to try all.
    """
    seeds = sorted(set(row) & set(baseline))
    if not seeds:
        return None
    if len(seeds) > _MOST_SEEDS:
        raise ValueError(f"{len(seeds)} seeds given; at most {_MOST_SEEDS} can be compared")
    differences = [row[seed] - baseline[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) if len(seeds) > 1 else 0.0
    return PairedTest(
        difference=mean,
        t=mean / spread * math.sqrt(len(seeds)) if spread else None,
        p=_sign_flip_p(np.array(differences)),
        seeds=len(seeds),
    )


def compare_measures(
    runs: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
    measures: Mapping[str, str],
) -> dict[str, PairedTest]:
    """Return the test of every measure that runs of a row and of its baseline have in some seed.

    runs, baseline: one a seed. measures: name -> its column there; what is not finite is not there.
    """
    tests = {
        name: compare_paired(_by_seed(runs, column), _by_seed(baseline, column))
        for name, column in measures.items()
    }
    return {name: test for name, test in tests.items() if test is not None}


def to_columns(tests: Mapping[str, PairedTest]) -> dict[str, float | None]:
    """Return difference, t and p of every measure as columns of a table's row."""
    found: dict[str, float | None] = {}
    for name, test in tests.items():
        found |= {f"{name}_difference": test.difference, f"{name}_t": test.t, f"{name}_p": test.p}
    return found


def _by_seed(runs: Sequence[Mapping[str, Any]], column: str) -> dict[int, float]:
    values = {run["seed"]: run[column] for run in runs if column in run}
    return {seed: x for seed, x in values.items() if x is not None and math.isfinite(x)}


def least_p(num_seeds: int) -> float:
    """Return the least p that `compare_paired` can find: the row is better, or worse, in all."""
    return 2.0 ** (1 - num_seeds)


def _sign_flip_p(differences: np.ndarray) -> float:
    count = len(differences)
    ways = np.arange(2**count)[:, None] >> np.arange(count) & 1
    sums = np.abs((1 - 2 * ways) @ differences)
    observed = abs(differences.sum())
    return float((sums >= observed - _ROUNDING * np.abs(differences).sum()).mean())
