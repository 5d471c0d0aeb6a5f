"""A record becomes plots, verdicts and samples, as far as its rows were run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.record import read_record, write_record
from PIL import Image

from research.ablations import claims, evidence_report
from research.ablations.findings import Findings
from research.ablations.frame_cache import write_frames
from research.ablations.report import CLAIMS_NAME, draw, draw_samples
from research.ablations.results import summarize
from research.ablations.run_one import FRAMES_NAME, UNTRAINED_NAME, teacher_folder

SEEDS = range(3)


def make_run(seed: int, quality: float, **more: Any) -> dict[str, Any]:
    """Return a run's row as a worker writes it, with its shares."""
    shares = {"digit_share": 0.99, "motion_share": 0.95, "frechet_share": quality}
    return {"seed": seed, "frechet_teacher": quality, "layers": [0, 2], **shares, **more}


def learn(seed: int) -> dict[str, Any]:
    """Return what a run keeps of a selection that is followed."""
    course = [
        {"step": step, "layer_scores": [0.5 - 0.1 * step, 0.5 + 0.1 * step, 0.4]}
        for step in range(4)
    ]
    gaps = [{"step": s, "gap_frechet": 1 / (s + 1), "score_distance": 0.4} for s in (1, 3)]
    return {
        "mean_scores": [0.3, 0.7, 0.4 + 0.1 * seed],
        "last_scores": [0.0, 1.0, 0.0],
        "score_course": course,
        "gap_course": gaps,
    }


TABLES = {
    ("objective", "adm"): [make_run(i, 1 + 0.1 * i, **learn(i)) for i in SEEDS],
    ("objective", "velocity_equal_time"): [make_run(i, 2 + 0.1 * i) for i in SEEDS],
    ("objective", "adm_literal"): [
        make_run(0, 50.0),
        *({"seed": i, "error": "the loss became nan at step 7"} for i in (1, 2)),
    ],
    ("objective", "dmd"): [{"seed": i, "error": "the loss became nan"} for i in SEEDS],
    ("selection", "learned"): [make_run(i, 1 + 0.1 * i, **learn(i)) for i in SEEDS],
    ("selection", "replace_one"): [
        make_run(i, 1.5, ranking_measure="replace-one", layer_errors=[0.1, 0.3, 0.2]) for i in SEEDS
    ],
    ("target", "2"): [make_run(i, 1.0) for i in SEEDS],
    ("target", "3"): [make_run(i, 3.0) for i in SEEDS],
}
PLOTS = ("target", "objective", "selection", "scores", "order", "gap")


def make_result(tables: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what ablation.json holds of such runs."""
    members, runs = [], []
    for (table, name), mine in tables.items():
        folders = [f"runs/{table}-{name}/seed-{run['seed']}" for run in mine]
        members.append({"table": table, "name": name, "runs": folders})
        runs += [{"run": f, **run} for f, run in zip(folders, mine, strict=True)]
    return {
        "rows": [summarize(table, name, mine) for (table, name), mine in tables.items()],
        "members": members,
        "runs": runs,
        "teacher": [{"seed": i, "frechet": 1.0} for i in SEEDS],
        "untrained": [],
    }


def is_blank(path: Path) -> bool:
    with Image.open(path) as image:
        low, high = image.convert("L").getextrema()
    return low == high


def test_every_plot_is_drawn_from_the_record_also_where_seeds_diverged(tmp_path: Path) -> None:
    result = make_result(TABLES)
    before = json.dumps(result)
    paths = draw(Findings(result), tmp_path / "new")
    assert [path.name for path in paths] == [f"evidence_{name}.png" for name in PLOTS]
    assert not any(is_blank(path) for path in paths)
    assert json.dumps(result) == before


@pytest.mark.parametrize(
    ("kept", "drawn"), [(("target",), ["target"]), (("objective",), ["objective"]), ((), [])]
)
def test_what_was_not_run_is_not_drawn(
    kept: tuple[str, ...], drawn: list[str], tmp_path: Path
) -> None:
    tables = {place: runs for place, runs in TABLES.items() if place[0] in kept}
    paths = draw(Findings(make_result(tables)), tmp_path)
    assert [path.name for path in paths] == [f"evidence_{name}.png" for name in drawn]


def test_the_command_makes_the_same_of_a_record_whenever_it_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make_result(TABLES)
    details = {key: result[key] for key in ("members", "runs", "teacher", "untrained")}
    about = {"title": "t", "command": "c", "device": "cpu", "details": details}
    record = write_record(tmp_path / "evidence.json", rows=result["rows"], **about)
    # As one that was measured elsewhere and some time ago.
    record |= {"device": "a GPU", "date": "2026-01-02"}
    (tmp_path / "evidence.json").write_text(json.dumps(record))
    evidence_report.main(["--results", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(PLOTS)
    made = {path: path.read_bytes() for path in tmp_path.iterdir()}
    judged = read_record(tmp_path / CLAIMS_NAME)
    assert (judged["device"], judged["date"]) == ("a GPU", "2026-01-02")
    assert judged["rows"] == claims.judge(Findings(record))
    assert "details" not in judged
    evidence_report.main(["--results", str(tmp_path)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == made


def test_samples_of_teacher_and_rows_are_drawn_from_the_kept_frames(tmp_path: Path) -> None:
    found, stem = Findings(make_result(TABLES)), tmp_path / "docs" / "samples"
    assert draw_samples(found, tmp_path, stem) == []
    shared = teacher_folder(tmp_path, 0)
    folders = [shared, shared / UNTRAINED_NAME, tmp_path / "runs/objective-adm/seed-0"]
    for folder in folders:
        write_frames(folder / FRAMES_NAME, torch.rand(2, 5, 8, 8), ["one", "two"])
    paths = draw_samples(found, tmp_path, stem)
    assert [path.name for path in paths] == ["samples.png", "samples.gif"]
    assert not is_blank(paths[0])
    with Image.open(paths[1]) as image:
        assert image.n_frames > 5
