"""Verdicts follow from the seeds by a stated rule, and nothing is claimed of what was not run."""

from typing import Any

import pytest

from research.ablations import claims
from research.ablations.findings import Findings
from research.ablations.results import is_below_by_own_spread, is_outside_spread, summarize

Table = dict[tuple[str, str], list[dict[str, Any]]]


def find(tables: Table) -> Findings:
    """Return the findings of runs given by table and row."""
    rows, members, runs = [], [], []
    for (table, name), mine in tables.items():
        rows.append(summarize(table, name, mine))
        folders = [f"runs/{table}-{name}/seed-{i}" for i in range(len(mine))]
        members.append({"table": table, "name": name, "runs": folders})
        runs += [{"run": f, **run} for f, run in zip(folders, mine, strict=True)]
    details = {"members": members, "runs": runs, "teacher": [], "untrained": []}
    return Findings({"rows": rows, "details": details})


def seeds(**columns: list[float]) -> list[dict[str, Any]]:
    """Return runs, one a seed, with these measures."""
    values = zip(*columns.values(), strict=True)
    return [{"seed": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(values)]


def verdicts(found: Findings, row: str) -> dict[str, str]:
    return {c["question"]: c["verdict"] for c in claims.judge(found) if c["row"] == row}


@pytest.mark.parametrize(
    ("lower", "higher", "is_outside"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], True),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], False),
        # Far apart on average, yet one seed lies among the other's.
        ([1.0, 1.0, 1.0, 1.0, 2.0], [1.9, 2.0, 2.1, 2.9, 3.0], False),
        # No overlap, and still nearer than both spreads together.
        ([1.0, 1.5, 2.0], [2.1, 2.3, 2.5], True),
        ([1.0, 1.5, 2.0], [2.01, 2.01, 2.5], False),
        ([1.0, 1.0], [1.0, 1.0], False),
    ],
)
def test_outside_the_spread_needs_distance_and_no_overlap(
    lower: list[float], higher: list[float], is_outside: bool
) -> None:
    assert is_outside_spread(lower, higher) is is_outside


def test_below_a_median_counts_ones_own_spread_alone() -> None:
    assert is_below_by_own_spread([1.0, 1.1, 1.2], 1.3)
    assert not is_below_by_own_spread([1.0, 1.1, 1.2], 1.15)
    assert not is_below_by_own_spread([0.1, 1.0, 1.2], 1.25)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_seed_has_no_spread(values: list[float]) -> None:
    with pytest.raises(ValueError, match="spread needs 2"):
        is_outside_spread(values, [1.0, 2.0])
    with pytest.raises(ValueError, match="spread needs 2"):
        is_below_by_own_spread(values, 2.0)


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([1.0, 1.0, 1.0], claims.MOONSHOT),
        ([0.99, 0.98, 0.98], claims.REACHED),
        ([0.99, 0.97, 0.97], claims.MISSED),
        ([1.0, 1.0], claims.FEW_SEEDS),
    ],
)
def test_a_bar_is_held_against_the_mean_of_three_seeds(shares: list[float], verdict: str) -> None:
    found = find({("target", "5"): seeds(digit_share=shares)})
    said = verdicts(found, "target 5")
    assert said["digit, share of the teacher's"] == verdict
    assert said["motion, share of the teacher's"] == claims.NOT_MEASURED


def test_a_row_of_which_a_seed_diverged_misses_its_bar() -> None:
    runs = [*seeds(digit_share=[1.0, 1.0, 1.0]), {"seed": 3, "error": "the loss became nan"}]
    assert set(verdicts(find({("target", "5"): runs}), "target 5").values()) == {claims.MISSED}


@pytest.mark.parametrize(
    ("mine", "verdict"),
    [
        ([1.0, 1.1, 1.2], claims.MOONSHOT),
        ([1.6, 1.7, 1.8], claims.REACHED),
        ([2.0, 2.9, 4.0], claims.MISSED),
    ],
)
def test_an_objective_is_compared_with_velocity_matching_of_equal_time(
    mine: list[float], verdict: str
) -> None:
    found = find(
        {
            ("objective", "adm"): seeds(frechet_teacher=mine),
            ("objective", "velocity_equal_time"): seeds(frechet_teacher=[3.0, 3.1, 3.2]),
        }
    )
    assert set(verdicts(found, "objective adm").values()) == {verdict}
    assert set(verdicts(found, "objective adm_after_velocity").values()) == {claims.NOT_RUN}


def test_a_learned_choice_is_compared_with_each_rule_and_the_median_of_random_ones() -> None:
    rows = {"learned": [1.0, 1.1, 1.2], "alternate": [1.0, 2.0, 2.0], "random": [1.1, 1.4, 9.0]}
    rows["replace_one"] = [2.0, 2.0, 2.1]
    found = find({("selection", n): seeds(frechet_teacher=v) for n, v in rows.items()})
    said = verdicts(found, "selection learned")
    assert said["lower Frechet to the teacher than alternate"] == claims.MISSED
    assert said["lower Frechet to the teacher than the median of 3 random choices"] == "reached"
    assert said["lower Frechet to the teacher than replace_one"] == claims.MOONSHOT
    assert said["lower Frechet to the teacher than restore_one"] == claims.NOT_MEASURED


def test_a_smaller_file_may_lose_a_twentieth_at_a_fifth_of_the_bytes() -> None:
    same = {"digit": [1.0] * 3, "motion": [1.0] * 3}
    found = find(
        {
            ("parameters", "full"): seeds(**same, frechet=[1.0] * 3, bytes=[1000.0] * 3),
            ("parameters", "lora_8"): seeds(**same, frechet=[1.04] * 3, bytes=[100.0] * 3),
            ("parameters", "lora_32"): seeds(**same, frechet=[1.06] * 3, bytes=[300.0] * 3),
        }
    )
    assert list(verdicts(found, "parameters lora_8").values()) == [claims.REACHED] * 2
    assert list(verdicts(found, "parameters lora_32").values()) == [claims.MISSED] * 2
