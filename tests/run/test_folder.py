"""A run folder belongs to one config and says so."""

import dataclasses
import json
from pathlib import Path

import pytest

from linvideo_core.run.config import option, to_json
from linvideo_core.run.errors import SettingError
from linvideo_core.run.folder import OtherRunError, check_run, open_run, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Nested settings."""

    depth: int = option(3, "how deep")
    num_doors: int = option(1, "how many ways in")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a run."""

    room: Room = dataclasses.field(default_factory=Room)
    rate: float = option(0.1, "how fast")
    model: Path | None = option(None, "which")
    device: str = option("cpu", "where")


def test_the_first_call_writes_the_config_and_repeating_it_changes_nothing(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a" / "b"
    open_run(folder, Run())
    assert (folder / "config.json").read_text() == to_json(Run())
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    before = (folder / "config.json").stat().st_mtime_ns
    open_run(folder, Run())
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_checking_a_folder_writes_nothing_and_ignores_what_it_may(tmp_path: Path) -> None:
    check_run(tmp_path, Run())
    assert not list(tmp_path.iterdir())
    open_run(tmp_path, Run())
    for check in (check_run, open_run):
        check(tmp_path, Run(device="cuda"), ignore=("device",))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Run(device="cuda", rate=0.2), "--rate 0.1 and this run has 0.2"),
        (Run(room=Room(num_doors=2)), "--num-doors 1 and this run has 2"),
        (Run(room=Room(depth=4)), "depth 3 and this run has 4"),
        (Run(model=Path("m.safetensors")), "model none and this run has m.safetensors"),
    ],
)
def test_another_config_is_refused_by_the_setting_that_differs(
    other: Run, words: str, tmp_path: Path
) -> None:
    open_run(tmp_path, Run())
    before = (tmp_path / "config.json").read_bytes()
    for check in (check_run, open_run):
        with pytest.raises(OtherRunError, match=words) as caught:
            check(tmp_path, other, ignore=("device",), new_run=" with all of it")
        assert "choose another --out with all of it, or give what it was" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("device", ["cuda:1", "cuda", "auto"])
def test_a_run_continues_on_any_device_of_its_kind(device: str, tmp_path: Path) -> None:
    open_run(tmp_path, Run(device="cuda:0"))
    open_run(tmp_path, Run(device=device))
    with pytest.raises(OtherRunError, match="device cuda:0 and this run has cpu"):
        open_run(tmp_path, Run(device="cpu"))


@pytest.mark.parametrize("name", ["taken", "taken/run"])
def test_a_file_in_the_folders_place_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file and a folder is needed"):
        check_run(tmp_path / name, Run())


@pytest.mark.skipif(not Path("/proc").exists(), reason="nobody can write into Linux' /proc")
@pytest.mark.parametrize("name", ["/proc", "/proc/run"])
def test_a_place_that_cannot_be_written_to_is_refused_by_its_flag(name: str) -> None:
    words = f"{name} is needed, and nothing can be written to /proc .*; choose another --out"
    with pytest.raises(SettingError, match=words):
        check_run(Path(name), Run())


def test_a_setting_that_an_older_run_does_not_name_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"room": {}, "rate": 0.1, "device": "cpu"}))
    before = (tmp_path / "config.json").read_bytes()
    open_run(tmp_path, Run())
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="depth 3 and this run has 4"):
        open_run(tmp_path, Run(room=Room(depth=4)))
    with pytest.raises(ValueError, match=r"model none and this run has m.safetensors"):
        open_run(tmp_path, Run(model=Path("m.safetensors")))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null"])
def test_a_damaged_config_is_named_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged") as caught:
        open_run(tmp_path, Run())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_are_read_row_by_row(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 0.5, "layer_scores": [0.1, 0.2]} for i in range(3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(path) == rows
