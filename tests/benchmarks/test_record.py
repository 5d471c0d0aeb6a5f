"""Records say where their numbers come from, and one table never mixes two devices."""

import concurrent.futures
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import (
    Change,
    change_part,
    check_parts,
    describe_device,
    read_part,
    read_record,
    replacing,
    show_rows,
    without,
    write_part,
    write_record,
)
from results.tables import cell, render

_SOURCE = "{'title': '', 'command': '', 'date': '', 'device': '', 'versions': {}"


def write(path: Path, part: str, seconds: float, **details: Any) -> dict[str, Any]:
    rows = [{"what": part, "seconds": seconds}]
    return write_part(
        path, part, title="All", command=f"run {part}", rows=rows, device="cpu", details=details
    )


def test_a_record_names_its_source_and_stores_what_is_not_finite_as_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed.json"
    write_record(path, title="Speed", command="run", rows=[{"x": float("nan")}], device="cpu")
    record = read_record(path)
    assert record["rows"] == [{"x": None}] and record["device"] == describe_device("cpu")
    assert record["versions"].keys() == {"linvideo", "python", "torch"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a JSON file"),
        ("[]", "lacks title"),
        ("{}", "lacks title"),
        (f"{_SOURCE}, 'rows': null}}", "rows are no list of objects"),
        (f"{_SOURCE}, 'rows': [1]}}", "rows are no list of objects"),
        (f"{_SOURCE}, 'rows': [], 'details': null}}", "parts do not say command, date, device"),
        (f"{_SOURCE}, 'rows': [], 'details': {{'parts': {{'a': {{}}}}}}}}", "parts do not say"),
        (f"{_SOURCE}, 'rows': [], 'details': {{'parts': {{'a': 1}}}}}}", "parts do not say"),
    ],
)
def test_anything_else_is_no_record(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text.replace("'", '"'))
    with pytest.raises(ValueError, match=reason):
        read_record(path)


def test_a_part_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    write(path, "train", 1.0, runs=[1])
    write(path, "denoise", 2.0)
    record = write(path, "train", 3.0, runs=[2])
    assert [(row["what"], row["seconds"]) for row in record["rows"]] == [
        ("train", 3.0), ("denoise", 2.0),
    ]  # fmt: skip
    assert record["command"] == "run train && run denoise"
    rows, kept = read_part(path, "train")
    assert rows == [{"what": "train", "seconds": 3.0}] and kept["runs"] == [2]
    assert read_part(path, "none") == read_part(tmp_path / "none.json", "train") == ([], {})


def test_parts_of_two_devices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    write(path, "train", 1.0)
    record = json.loads(path.read_text())
    record["details"]["parts"]["train"]["device"] = "a card"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rows of train measured on a card, and this is"):
        write(path, "denoise", 2.0)
    assert json.loads(path.read_text()) == record


def test_parts_that_are_written_at_the_same_time_all_stay(tmp_path: Path) -> None:
    path, names = tmp_path / "scale.json", ["a", "b", "c", "d"]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: write(path, name, 1.0), names))
    assert sorted(row["what"] for row in read_record(path)["rows"]) == names


def test_rows_that_are_added_to_a_part_at_the_same_time_all_stay(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"

    def add(seconds: float) -> None:
        row = {"what": "train", "seconds": seconds}
        change = replacing([row], ["seconds"], [row])
        change_part(path, "train", change, title="All", command="run", device="cpu")

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    assert sorted(row["seconds"] for row in read_part(path, "train")[0]) == [0, 1, 2, 3]


def test_an_earlier_row_may_lack_a_name_that_todays_have() -> None:
    older, mine = {"model": "a"}, {"model": "a", "layers": 3}
    assert without([older, mine], [mine], ["model", "layers"]) == [older]


def test_commands_and_details_stay_while_rows_do_and_a_part_without_rows_goes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "scale.json"
    write(path, "denoise", 1.0)
    write(path, "train", 1.0, note="of one card")

    def put(change: Change, command: str) -> dict[str, Any]:
        record = change_part(path, "train", change, title="All", command=command, device="cpu")
        return record["details"]["parts"]

    row = {"what": "train", "seconds": 2.0}
    kept = put(replacing([row], ["seconds"], [row]), "run more")["train"]
    assert (kept["command"], kept["note"]) == ("run train && run more", "of one card")
    kept = put(replacing([row], ["what"], [row]), "run again")["train"]
    assert kept["command"] == "run again" and "note" not in kept
    assert put(lambda *_: ([], {}), "run none").keys() == {"denoise"}


def test_a_record_that_cannot_be_written_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    path, advice = tmp_path / "new" / "scale.json", "leave out --record or choose another --out"
    write(path, "train", 1.0)
    path.write_text(path.read_text().replace(describe_device("cpu"), "a card"))
    with pytest.raises(ValueError, match=rf"a card, and this is .*; {advice}, or delete that file"):
        check_parts(path, "cpu")
    path.unlink()
    (path.parent / ".records").rmdir()
    (path.parent / ".records").touch()
    with pytest.raises(ValueError, match=f"records is a file and a folder is needed; {advice}"):
        check_parts(path, "cpu")
    path.mkdir()
    with pytest.raises(ValueError, match=f"is a folder and a file is needed; {advice}"):
        check_parts(path, "cpu")
    shutil.rmtree(path.parent)
    path.parent.touch()
    with pytest.raises(ValueError, match=f"new is a file and a folder is needed; {advice}"):
        check_parts(path, "cpu")


@pytest.mark.parametrize(
    ("value", "spread", "shown"),
    [
        (0.5, None, "0.500"),
        (12345, None, "12,345"),
        (None, 0.1, "—"),
        (104.52, 1.87, "104.5 ± 1.9"),
        (0.996, 0.004, "0.9960 ± 0.0040"),
        (1.0, 1e-9, "1.00"),
        ("a|b", None, r"a\|b"),
        (True, None, "yes"),
    ],
)
def test_a_mean_and_its_spread_have_the_same_decimals(
    value: Any, spread: float | None, shown: str
) -> None:
    assert cell({"x": value, "x_spread": spread}, "x") == shown


def test_numbers_stand_at_the_right_in_a_page_and_a_terminal() -> None:
    rows = [{"a_name": "x", "n": 1.5}, {"a_name": "longer", "n": None}]
    assert render(rows, ["a_name", "n"]).splitlines() == [
        "| a name   |    n |",
        "|:---------|-----:|",
        "| x        | 1.50 |",
        "| longer   |    — |",
    ]
    assert show_rows(rows).splitlines() == ["a_name     n", "     x  1.50", "longer     —"]
