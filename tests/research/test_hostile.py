"""A minute of damaged files in the real readers; `python -m research.hostile` tries more."""

import json
from pathlib import Path

import pytest

from linvideo_core.run.errors import SettingError
from research.hostile import cli, kinds, reader


def test_no_damaged_file_is_more_than_refused(tmp_path: Path) -> None:
    rows, failures = cli.run(cli.HostileConfig(minutes=1.0))
    assert failures == []
    assert all(row["tried"] == row["refused"] + row["accepted_benign"] for row in rows)
    assert all(row["refused"] for row in rows)
    cli.record(tmp_path, "files", "a command", rows)
    assert json.loads((tmp_path / "hostile.json").read_text())["rows"] == rows


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_whole_files_are_accepted_and_a_case_is_its_seeds(kind: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        reader.make_case(kind, 5, tmp_path / name)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in files}
        for name in ("one", "two")
        for files in [[p for p in (tmp_path / name).rglob("*") if p.is_file()]]
    )
    assert one == two
    assert reader.judge(kind, tmp_path / f"{kind}-whole") == ("accepted_benign", "")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SettingError, match="'dreams' is unknown"):
        cli.HostileConfig(kinds="lora,dreams")
