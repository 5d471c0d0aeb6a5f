"""An ablation: declared rows become runs, runs become means, and nothing is done twice."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from linvideo_core.transfer.objectives import OBJECTIVES

from linvideo_core.run.config import override
from linvideo_core.transfer.pipeline import TransferConfig
from research.ablations import cli as ablate
from research.ablations.declared import TABLES, choose_tables, list_runs
from research.ablations.results import share_of_teacher, show_tables, summarize
from research.ablations.training_clock import TrainingClock

EVEN = dict.fromkeys(OBJECTIVES, 1.0)
TINY = [
    *("--tables", "selection", "--only", "alternate,random", "--seeds", "1", "--jobs", "1"),
    *("--steps", "3", "--batch-size", "1", "--warm-start-steps", "1", "--checkpoint-every", "1"),
    *("--num-trajectories", "2", "--shard-size", "2", "--sampler-steps", "2"),
    *("--states-per-trajectory", "2", "--evaluate-samples", "2", "--evaluate-batch-size", "2"),
    *("--device", "cpu"),
]


def test_every_row_changes_settings_that_a_transfer_has() -> None:
    rows = list_runs(TABLES, TransferConfig(), range(2), EVEN)
    assert len(rows) == sum(len(table) for table in TABLES.values())
    for (_, name), runs in rows.items():
        assert [run.config.seed for run in runs] == [0, 1], name


def test_rows_that_come_to_the_same_training_share_its_run() -> None:
    rows = list_runs(TABLES, TransferConfig(), range(1), EVEN)
    usual = [
        ("objective", "adm"), ("selection", "learned"), ("target", "5"), ("feature_map", "D"),
        ("parameters", "lora_32"),
    ]  # fmt: skip
    folders = [rows[row][0].folder for row in usual]
    assert len(set(folders)) == 1
    others = {runs[0].folder for row, runs in rows.items() if row not in usual}
    # At even seconds per step velocity matching gets the same number of steps; all layers linear
    # and feature maps alone are rows of two tables each.
    assert len(others) == len(rows) - len(usual) - 3 and folders[0] not in others


def test_the_selection_is_followed_of_its_table_alone_whichever_tables_are_run() -> None:
    only = choose_tables("objective")
    rows = list_runs(only, TransferConfig(), range(1), EVEN)
    followed = {name for (_, name), [run] in rows.items() if run.is_followed}
    assert followed == {"adm"}
    rows = list_runs(TABLES, TransferConfig(), range(1), EVEN)
    assert all(run.is_followed for (table, _), [run] in rows.items() if table == "selection")


def test_equal_time_gives_the_cheaper_objective_more_steps() -> None:
    config = override(TransferConfig(), {"steps": 100})
    rows = list_runs(TABLES, config, range(1), {**EVEN, "adm": 0.5, "velocity": 0.2})
    [equal] = rows["objective", "velocity_equal_time"]
    [plain] = rows["objective", "velocity"]
    assert (equal.config.training.steps, plain.config.training.steps) == (250, 100)


@pytest.mark.parametrize(
    ("tables", "only", "said"),
    [
        ("objective,speed", None, "--tables objective,speed given, and 'speed' is no table"),
        ("objective", "last", "--only last given, and 'last' is no row of these tables"),
    ],
)
def test_unknown_names_are_refused_in_a_sentence(tables: str, only: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_tables(tables, only)


def test_a_row_is_the_mean_of_its_seeds_with_their_sample_deviation() -> None:
    runs = [
        {"seed": i, "digit": digit, "frechet": f, "gap": g, "layers": [i]}
        for i, (digit, f, g) in enumerate([(0.9, 2.0, 0.1), (0.8, 4.0, None), (1.0, 3.0, 0.2)])
    ]
    row = summarize("selection", "first", [*runs, {"seed": 3, "error": "the loss became nan"}])
    assert (row["seeds"], row["failed"], row["error"]) == (3, 1, "the loss became nan")
    assert row["digit"] == pytest.approx(0.9)
    assert row["frechet_spread"] == pytest.approx(statistics.stdev([2.0, 4.0, 3.0]))
    assert "gap" not in row and "layers" not in row
    shown = show_tables([row])
    assert "0.90 ± 0.10" in shown and "the loss became nan" in shown


def test_a_share_is_what_the_student_has_of_its_teacher() -> None:
    shares = share_of_teacher({"digit": 0.9, "frechet": 3.0}, {"digit": 1.0, "frechet": 2.0})
    assert shares == {"digit_share": 0.9, "frechet_share": 1.5}


def test_the_clock_counts_training_without_what_it_held(tmp_path: Path) -> None:
    clock = TrainingClock("cpu", tmp_path / "seconds.json")
    clock.hear("warm start", 0, 4)
    clock.hear("training", 0, 4)
    with clock.frozen_weights():
        time.sleep(0.3)
    clock.hear("training", 4, 4)
    assert 0 <= clock.seconds < 0.3
    assert TrainingClock("cpu", tmp_path / "seconds.json").seconds == clock.seconds


def test_an_ablation_that_is_killed_continues_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ablate.main([*TINY, "--out", str(whole)])
    process = subprocess.Popen(
        [sys.executable, "-m", "research.ablations", *TINY, "--out", str(broken)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(broken.glob("runs/*/*/training/checkpoint.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    ablate.main([*TINY, "--out", str(broken)])
    results = [json.loads((out / "ablation.json").read_text()) for out in (whole, broken)]
    measures = [
        [(row["name"], row["digit"], row["frechet"], row["velocity_error"]) for row in r["rows"]]
        for r in results
    ]
    assert [name for name, *_ in measures[0]] == [
        "teacher",
        "swapped_untrained",
        "alternate",
        "random",
    ]
    assert [member["runs"] for member in results[0]["members"]] == [
        [run["run"]] for run in results[0]["runs"]
    ]
    assert results[0]["rows"][0]["frechet_share"] == 1
    [untrained] = results[0]["untrained"]
    assert untrained["layers"] == [0, 1, 2, 3, 4] and untrained["frechet_share"] > 0
    for unbroken, resumed in zip(*measures, strict=True):
        assert resumed == pytest.approx(unbroken)
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("row.json")}
    ablate.main([*TINY, "--out", str(broken)])
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("row.json")} == before
