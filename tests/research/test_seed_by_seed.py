"""Rows of the evidence are compared within their seeds, and how much was looked at is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from research import floor, seed_by_seed
from research.seed_by_seed import MEASURES, PAIRS, compare_all, describe


def make_record() -> dict[str, Any]:
    """Return a record of three seeds: `adm` has more of all measures in every seed, others vary."""
    names = {(table, name) for table, pairs in PAIRS.items() for pair in pairs for name in pair}
    runs, members = [], []
    for number, (table, name) in enumerate(sorted(names)):
        keys = [f"{table}/{name}/{seed}" for seed in range(3)]
        members.append({"table": table, "name": name, "runs": keys})
        for seed, key in enumerate(keys):
            value = 100.0 + seed if name == "adm" else float(number * (-1) ** seed)
            runs.append({"run": key, "seed": seed, **dict.fromkeys(MEASURES.values(), value)})
    source = {"title": "", "command": "made", "date": "", "device": "", "versions": {}}
    return {**source, "rows": [], "details": {"runs": runs, "members": members}}


def test_every_pair_is_compared_in_every_measure() -> None:
    rows = compare_all(make_record())
    assert len(rows) == sum(map(len, PAIRS.values()))
    first = rows[0]
    assert (first["row"], first["less"], first["seeds"]) == ("adm", "velocity_equal_time", 3)
    assert first["one_sided"] == list(MEASURES)
    assert all(first[f"{measure}_p"] == 0.25 for measure in MEASURES)
    # The others change sign from seed to seed.
    assert all(row["one_sided"] == [] for row in rows[1:])


def test_what_chance_would_give_is_said_beside_what_was_found() -> None:
    said = describe(compare_all(make_record()))
    assert said.startswith("150 paired tests, 10 measures of 15 pairs of rows: 10 differ in one")
    assert said.endswith("where chance alone would give 38")


def test_the_command_writes_all_tests_with_where_they_come_from(tmp_path: Path) -> None:
    record, out = tmp_path / "record.json", tmp_path / "pairs.json"
    record.write_text(json.dumps(make_record()), encoding="utf-8")
    seed_by_seed.main(["--record", str(record), "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["command"] == "made && python -m research.seed_by_seed"
    assert written["rows"] == compare_all(make_record())


def test_the_teacher_of_other_noise_is_the_floor(tmp_path: Path) -> None:
    flags = ["--num-samples", "4", "--sampler-steps", "1", "--device", "cpu"]
    floor.main([*flags, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "floor.json").read_text(encoding="utf-8"))
    teacher, student = written["rows"]
    assert (teacher["model"], student["model"]) == ("teacher", "student")
    assert teacher["paired"] == 0 < student["paired"] < teacher["unpaired"]
    assert student["unpaired"] == pytest.approx(teacher["unpaired"], rel=0.5)
