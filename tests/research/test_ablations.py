"""An ablation: declared rows become transfers, transfers become means, nothing is done twice."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from benchmarks.record import RESULTS_FOLDER, read_part
from linvideo_core.run.config import parse
from linvideo_core.transfer.config import TransferConfig
from research import ablations, evaluation_record
from research.ablation_plots import draw, plot_hybrid
from research.ablations import PRESETS, TABLES, AblationConfig, list_runs, read_row
from research.declared_runs import summarize


def test_every_row_is_a_transfer_that_the_command_line_takes() -> None:
    config = AblationConfig(
        tables="all", **{k: v for k, v in PRESETS["gpu"].items() if k == "flags"}
    )
    for (_, name), [run, _] in list_runs(config).items():
        words = [*config.flags.split(), *run.flags.split()]
        found = parse(TransferConfig, words, description=name)
        assert found.training.steps >= config.steps, name


def test_rows_that_come_to_the_same_training_share_its_run() -> None:
    rows = list_runs(AblationConfig(tables="all", seeds=1))
    assert len(rows) == sum(map(len, TABLES.values()))
    usual = [
        ("objective", "velocity"),
        ("selection", "learned"),
        ("target", "5"),
        ("feature_map", "D"),
    ]
    assert len({rows[row][0].folder for row in usual}) == 1
    [equal], [plain] = rows["objective", "velocity_equal_time"], rows["objective", "velocity"]
    assert equal.flags == "--steps 72"
    assert plain.flags == "--steps 60"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tables": "objective,speed"}, "--tables objective,speed given, and 'speed' is unknown"),
        ({"seeds": 0}, "--seeds 0 given"),
    ],
)
def test_unknown_names_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AblationConfig(**changes)


def test_a_row_is_the_mean_of_its_seeds_with_their_sample_deviation() -> None:
    runs = [
        {"seed": i, "digit": digit, "frechet": f, "gap": g, "layers": [i]}
        for i, (digit, f, g) in enumerate([(0.9, 2.0, 0.1), (0.8, 4.0, None), (1.0, 3.0, 0.2)])
    ]
    row = summarize([*runs, {"seed": 3, "error": "the loss became nan"}])
    assert (row["seeds"], row["failed"], row["error"]) == (3, 1, "the loss became nan")
    assert row["digit"] == pytest.approx(0.9)
    assert row["frechet_spread"] == pytest.approx(statistics.stdev([2.0, 4.0, 3.0]))
    assert "gap" not in row and "layers" not in row


def test_a_share_is_what_the_student_has_of_its_teacher(tmp_path: Path) -> None:
    rows = [
        {"model": "teacher", "digit": 1.0, "frechet": 2.0},
        {"model": "student", "digit": 0.9, "frechet": 3.0, "frechet_to_teacher": 0.5},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "linearized.safetensors").write_bytes(b"1234")
    row = read_row(tmp_path)
    assert (row["digit_share"], row["frechet_share"], row["bytes"]) == (0.9, 1.5, 4)
    assert row["frechet_teacher"] == 0.5 and "model" not in row


@pytest.mark.slow
def test_runs_that_are_done_are_not_done_again_and_one_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(TABLES, "selection", {"alternate": {"choice": "alternate"}})
    config = AblationConfig(
        tables="selection",
        seeds=1,
        jobs=1,
        steps=2,
        flags="--batch-size 1 --warm-start-steps 1 --num-trajectories 2 --shard-size 2 "
        "--sampler-steps 2 --states-per-trajectory 2 --evaluate-samples 2 --target 5",
        device="cpu",
        out=tmp_path,
    )
    result = ablations.run(config)
    [row] = result["rows"]
    assert row["seeds"] == 1 and row["frechet_share"] > 0 and row["seconds"] > 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")}
    assert ablations.run(config) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")} == before
    failing = dataclasses.replace(config, flags=f"{config.flags} --learning-rate -1", steps=3)
    assert [row["failed"] for row in ablations.run(failing)["rows"]] == [1]


def test_the_record_is_drawn_also_where_seeds_diverged(tmp_path: Path) -> None:
    record = json.loads((RESULTS_FOLDER / "evidence.json").read_text(encoding="utf-8"))
    failed = next(m["runs"][0] for m in record["details"]["members"] if m["name"] == "dmd")
    runs = record["details"]["runs"]
    record["details"]["runs"] = [
        {"run": run["run"], "error": "nan"} if run["run"] == failed else run for run in runs
    ]
    names = [path.name for path in draw(record, tmp_path)]
    assert names == ["evidence_target.png", "evidence_objective.png", "evidence_selection.png"]
    _, hybrid = read_part(RESULTS_FOLDER / "hybrid.json", "forms")
    plot_hybrid(hybrid["runs"], tmp_path / "hybrid.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_the_evaluation_of_the_shipped_file_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluation_record, "RESULTS_FOLDER", tmp_path)
    flags = "--num-samples 2 --sampler-steps 2 --batch-size 2 --device cpu"
    evaluation_record.main([*flags.split(), "--out", str(tmp_path / "evaluate")])
    record = json.loads((tmp_path / "transfer_demo.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in record["rows"]] == ["teacher", "swapped", "student"]
    assert record["title"] == "Embedded model, 5 of 10 layers linear, 2 samples"
    assert record["command"].startswith("python -m research.evaluation_record --num-samples 2")
    with pytest.raises(ValueError, match="of the embedded model and its own files alone"):
        evaluation_record.main(["--artifact", "other.safetensors"])


def test_the_distance_of_softmax_kernels_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluation_record, "RESULTS_FOLDER", tmp_path)
    flags = "--kernels flash --num-samples 2 --sampler-steps 1 --batch-size 2 --device cpu"
    evaluation_record.main([*flags.split(), "--out", str(tmp_path / "evaluate")])
    record = json.loads((tmp_path / "softmax_distance.json").read_text(encoding="utf-8"))
    assert "embedded model, 2 videos of 1 steps" in record["title"]
    rows = [(row["softmax_backend"], row["linear_layers"]) for row in record["rows"]]
    assert rows == [("default", 0), ("flash", 0), ("default", 5), ("flash", 5)]
    names = {"distance_to_teacher", "pixel_error", "temporal_spectrum_db"}
    assert all(names <= set(row) for row in record["rows"])
