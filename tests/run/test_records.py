"""A record on disk, the table in the page and the check between them agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from linvideo_core.run.records import (
    REPOSITORY,
    RESULTS_FOLDER,
    RecordsConfig,
    read_record,
    render_page,
    run,
    write_part,
    write_record,
)
from linvideo_core.run.tables import format_spread, format_value, render_table

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGE = "# Title\n\n<!-- record:demo -->\nold\n<!-- /record -->\n\nafter\n"
ROWS = [{"model": "teacher", "accuracy": 0.98}, {"model": "student", "accuracy": 0.9, "seconds": 7}]


@pytest.fixture
def config(tmp_path: Path) -> RecordsConfig:
    write_record(
        tmp_path / "results" / "demo.json", title="Demo", command="make it", rows=ROWS, device="cpu"
    )
    page = tmp_path / "README.md"
    page.write_text(PAGE, encoding="utf-8")
    return RecordsConfig(page=page, results=tmp_path / "results")


def test_a_record_says_what_how_when_and_on_what(config: RecordsConfig) -> None:
    record = read_record(config.results / "demo.json")
    assert list(record) == ["title", "command", "date", "device", "versions", "rows"]
    assert record["rows"] == ROWS
    assert record["device"].startswith("CPU")
    assert "torch" in record["versions"]


def test_what_is_not_finite_is_stored_as_null(tmp_path: Path) -> None:
    rows = [{"a": float("nan"), "b": [float("inf"), 1.5]}]
    write_record(tmp_path / "x.json", title="t", command="c", rows=rows, device="cpu")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text)["rows"] == [{"a": None, "b": [None, 1.5]}]


def test_rendering_twice_changes_nothing_and_leaves_the_rest_of_the_page(
    config: RecordsConfig,
) -> None:
    assert not run(config)
    text = config.page.read_text(encoding="utf-8")
    assert "| teacher | 0.980 | — |\n| student | 0.900 | 7 |\n" in text
    assert "`make it`" in text
    assert text.startswith("# Title\n\n<!-- record:demo -->\n")
    assert text.endswith("<!-- /record -->\n\nafter\n")
    assert run(config)
    assert config.page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("is_current", "code"), [(False, 1), (True, 0)])
def test_check_exits_with_1_where_page_and_records_differ(
    config: RecordsConfig, is_current: bool, code: int
) -> None:
    if is_current:
        run(config)
    before = config.page.read_text(encoding="utf-8")
    finished = call("--check", "true", "--page", config.page, "--results", config.results)
    assert finished.returncode == code, finished.stderr
    assert config.page.read_text(encoding="utf-8") == before


def test_a_missing_record_ends_with_one_sentence_and_exit_code_2(config: RecordsConfig) -> None:
    (config.results / "demo.json").unlink()
    finished = call("--page", config.page, "--results", config.results)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert "does not exist" in finished.stderr


def test_a_marker_may_choose_among_the_rows(config: RecordsConfig) -> None:
    page = PAGE.replace("record:demo", "record:demo model=student|other seconds=7")
    text = render_page(page, config.results)
    assert "| student | 0.900 | 7 |\n" in text and "teacher" not in text
    assert render_page(text, config.results) == text
    assert "No rows." in render_page(page.replace("=7", "=8"), config.results)


def test_the_rows_of_one_part_come_with_its_own_source(tmp_path: Path) -> None:
    for part in ("train", "denoise"):
        write_part(
            tmp_path / "demo.json", part, title="Demo", command=f"make {part}",
            rows=[{"what": part}], device="cpu",
        )  # fmt: skip
    text = render_page(PAGE, tmp_path)
    assert "<sub>`make train && make denoise` on CPU" in text
    text = render_page(PAGE.replace("record:demo", "record:demo what=train"), tmp_path)
    assert "<sub>`make train` on CPU" in text and "denoise" not in text
    text = render_page(PAGE.replace("record:demo", "record:demo what=train|denoise"), tmp_path)
    assert "<sub>`make train && make denoise` on CPU" in text


def test_parts_of_one_command_name_it_once(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    for part in ("one", "two"):
        write_part(
            path, part, title="Demo", command="make all", rows=[{"what": part}], device="cpu"
        )
    assert read_record(path)["command"] == "make all"


def test_a_record_that_is_awaited_shows_nothing_until_it_is_there(config: RecordsConfig) -> None:
    page = PAGE.replace("record:demo", "record:demo?")
    shown = render_page(page, config.results)
    assert "| teacher |" in shown and "old" not in shown
    (config.results / "demo.json").unlink()
    empty = render_page(shown, config.results)
    assert empty == "# Title\n\n<!-- record:demo? -->\n<!-- /record -->\n\nafter\n"


def test_a_marker_may_choose_columns_and_show_the_table_alone(tmp_path: Path) -> None:
    rows = [
        {"name": "a", "digit": 0.98533, "digit_spread": 0.0042, "bytes": 184320.0, "x": 1},
        {"name": "b", "digit": 0.5, "bytes": 2.0, "bytes_spread": 0.0},
    ]
    write_record(tmp_path / "demo.json", title="Demo", command="make it", rows=rows, device="cpu")
    marker = "record:demo columns=name|digit|bytes|frechet show=table"
    text = render_page(PAGE.replace("record:demo", marker), tmp_path)
    table = text.partition(" -->\n")[2].partition("<!-- /record")[0].splitlines()
    assert table == [
        "| name | digit | bytes | frechet |",
        "| --- | ---: | ---: | ---: |",
        "| a | 0.9853 ± 0.0042 | 184,320 | — |",
        "| b | 0.500 | 2.00 | — |",
    ]


@pytest.mark.parametrize(
    ("value", "spread", "shown"),
    [
        (12.345, 0.56, "12.35 ± 0.56"),
        (35.2, 12.3, "35 ± 12"),
        (184320.4, 1234.0, "184,320 ± 1,234"),
        (0.5, 0.0, "0.500"),
        (0.5, 0.00001, "0.500"),
    ],
)
def test_a_spread_has_two_figures_and_its_mean_as_many_decimals(
    value: float, spread: float, shown: str
) -> None:
    assert format_spread(value, spread) == shown


@pytest.mark.parametrize("text", ["<!-- record:demo -->\nopen", PAGE.replace("/record", "/rec")])
def test_a_marker_that_does_not_close_is_refused(config: RecordsConfig, text: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        render_page(text + PAGE, config.results)


@pytest.mark.parametrize("text", ["{", "[]", '{"title": "x"}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json"):
        read_record(path)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "—"),
        (True, "yes"),
        (1000, "1,000"),
        (8174.26, "8,174"),
        (0.98, "0.980"),
        (99.97, "100"),
        (12.345, "12.3"),
        (0.0, "0"),
        (0.00012, "1.2e-04"),
        (-0.5, "-0.500"),
        (float("inf"), "—"),
        ([1, 2, 5], "1, 2, 5"),
        ("a|b", r"a\|b"),
    ],
)
def test_values_are_shown_to_three_figures(value: object, shown: str) -> None:
    assert format_value(value) == shown


def test_columns_are_the_rows_keys_and_numbers_stand_right() -> None:
    lines = render_table(ROWS).splitlines()
    assert lines[0] == "| model | accuracy | seconds |"
    assert lines[1] == "| --- | ---: | ---: |"


@pytest.mark.parametrize(
    "page",
    [path for path in PAGES if "<!-- /record -->" in path.read_text("utf-8")],
    ids=lambda p: p.name,
)
def test_a_page_shows_the_records(page: Path) -> None:
    assert run(RecordsConfig(check=True, page=page)), f"run ... records --page {page}"


def test_stored_records_are_whole() -> None:
    for path in RESULTS_FOLDER.glob("*.json"):
        assert read_record(path)["rows"], path


def call(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "linvideo_core.run.records", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
