"""Hybrid layers compared: declared rows, their cost, and runs that are done once."""

import dataclasses
import json
from pathlib import Path

import pytest

from linvideo_core.run.errors import SettingError
from research import hybrid
from research.hybrid import TABLES, HybridConfig, summarize
from research.hybrid_student import FORMS, Case

GRID = (7, 8, 8)


@pytest.mark.parametrize(
    ("case", "share", "cost"),
    [
        (Case(form="linear"), 0, 0),
        (Case(form="linear", layers=5), 0, 0.5),
        (Case(form="query", tile=(1, 4, 4)), 16 / 448, 16 / 448),
        (Case(form="query", tile=(1, 8, 8), layers=8), 1 / 7, 0.2 + 0.8 / 7),
        (Case(form="sol_attn", density=0.2), 6 / 28, 6 / 28),
        (Case(form="pisa", density=0.2, layers=5), 6 / 28, 0.5 + 3 / 28),
        (Case(form="sla", density=0.05), 1 / 28, 1 / 28),
    ],
)
def test_the_cost_is_the_softmax_that_is_computed(case: Case, share: float, cost: float) -> None:
    assert case.share_of_tokens(GRID) == pytest.approx(share)
    assert case.cost(GRID) == pytest.approx(cost)


def test_every_row_is_declared_once_in_its_table() -> None:
    for cases in TABLES.values():
        assert len(cases) == len(set(cases))
    assert {case.form for case in TABLES["forms"]} == {*FORMS}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tables": "forms,dreams"}, "'dreams' is unknown"),
        ({"forms": "linear,guess"}, "'guess' is unknown"),
        ({"tables": "longer", "forms": "pisa"}, "which have no row in common"),
        ({"flags": "--steps 2 --tile=1x4x4"}, "rows have their own --tile: leave it out"),
    ],
)
def test_what_no_row_can_be_made_of_is_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        HybridConfig(**settings)


def test_a_case_is_shown_as_the_mean_of_its_seeds() -> None:
    same = {"form": "query", "tile": "1x4x4", "layers": 5, "steps": 2, "cost": 0.5}
    runs = [
        {**same, "seed": seed, "frechet": frechet, "digit": 0.5, "motion": 1.0, "seconds": 3.0}
        for seed, frechet in enumerate((1.0, 3.0))
    ]
    [row] = summarize(runs)
    assert (row["seeds"], row["frechet"], row["frechet_spread"]) == (2, 2.0, pytest.approx(2**0.5))
    assert len(summarize([*runs, {**runs[0], "layers": 8}])) == 2


@pytest.mark.slow
def test_rows_are_run_once_and_one_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        Case(form="query", tile=(1, 3, 8), layers=5),
        Case(form="moments", tile=(1, 3, 8)),
        Case(form="sla", density=0.1),
        Case(form="sol_attn", density=0.2, steps_factor=0),
        Case(form="pisa", density=0.2, steps_factor=0),
    ]
    monkeypatch.setitem(TABLES, "forms", cases)
    flags = (
        "--batch-size 2 --warm-start-steps 2 --num-trajectories 2 --shard-size 2 "
        "--sampler-steps 2 --states-per-trajectory 2 --evaluate-samples 4"
    )
    how = {"steps": 2, "seeds": 1, "jobs": 1, "device": "cpu", "out": tmp_path}
    one = HybridConfig(**how, forms="query", flags=flags)
    # A file stands where its folder is to be.
    (tmp_path / "runs").touch()
    assert hybrid.run(one) == {"forms": []}
    (tmp_path / "runs").unlink()
    [made] = hybrid.run(one)["forms"]
    with pytest.raises(SettingError, match="was made with --flags"):
        hybrid.run(HybridConfig(**how, flags=f"{flags} --batch-size 3"))
    # Of rows that are no longer declared the record loses none: they are the last.
    monkeypatch.setitem(TABLES, "forms", cases[1:])
    [other] = hybrid.run(dataclasses.replace(one, forms="pisa"))["forms"]
    monkeypatch.setitem(TABLES, "forms", cases)
    found = json.loads((tmp_path / "hybrid.json").read_text(encoding="utf-8"))
    assert found["details"]["parts"]["forms"]["runs"] == [other, made]
    config = dataclasses.replace(one, forms="")
    rows = hybrid.run(config)["forms"]
    row, whole, sla, *sparse = rows
    assert row == made
    assert (row["steps"], row["layers"], row["seed"]) == (2, 5, 0)
    assert (whole["form"], whole["layers"], whole["tile"]) == ("moments", 10, "1x3x8")
    assert (sla["form"], sla["steps"], sla["tile"]) == ("sla", 2, "density 0.1")
    assert [(each["form"], each["steps"]) for each in sparse] == [("sol_attn", 0), ("pisa", 0)]
    assert row["cost"] == pytest.approx(cases[0].cost(GRID))
    assert row["frechet"] > 0 and row["frechet_share"] > 0
    assert 0 <= row["digit"] <= 1 and 0 <= row["motion"] <= 1
    record = json.loads((tmp_path / "hybrid.json").read_text(encoding="utf-8"))
    assert record["details"]["parts"]["forms"]["runs"] == rows
    assert record["rows"] == [{"what": "forms", **x} for x in summarize(rows)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")}
    assert len(before) == len(cases)
    assert hybrid.run(config) == {"forms": rows}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")} == before
