"""A file's typed name leads to a place inside its folder on every system, or is refused."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linvideo_core.artifact import ArtifactError
from linvideo_core.artifact.file import check_name, place_file

OUTSIDE = ["//x/y", "\\\\x\\y", "/etc/x", "..", "../x", "a/../../b", "a\\..\\..\\b", "C:x", "C:\\x"]
OUTSIDE += ["~/x", "~root/x", "//?/C:/x", "\\\\.\\x", "a/../b", "./x", "/", "\\"]
NO_NAMES = ["", " ", ".", " . ", "...", "a//b", "a/", "a/ /b", "a /b", "mine.", ".hidden", "a/.b"]
NO_NAMES += ["con", "NUL.x", "nul.safetensors", "Com1", "lpt9.a.b", "com¹", "CONOUT$", "a/prn/b"]
NO_NAMES += ["con .x", "a*b", "a?", "a|b", 'a"', "<a>", "a:stream", "%date%", ".safetensors"]
NO_NAMES += ["\udcff", "a\0b", "a\n b", "a\tb", "\u202egnp.x", "a\u200bb", "a\u2028b", "\x7f"]
TOO_LONG = ["x" * 300, "é" * 200, "模" * 100, "a/" * 150 + "a", "x" * 5000]
PIECES = [*"/\\.:~% \n\0", "..", "con", "C:", ".safetensors", "\udcff", "\u202e", "é", "x" * 90]

hostile = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=()), max_size=12).map(
    "".join
)


def complaint(name: str, *, is_single: bool = False) -> str:
    """Return the one sentence with which a name is refused."""
    with pytest.raises(ArtifactError) as refused:
        check_name(name, is_single=is_single)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 250
    message.encode()
    return message


@pytest.mark.parametrize("name", [*OUTSIDE, *NO_NAMES])
def test_a_name_that_leads_out_or_is_none_somewhere_is_refused(name: str, tmp_path: Path) -> None:
    assert "cannot be used: give a plain name" in complaint(name)
    with pytest.raises(ArtifactError, match="cannot be used"):
        place_file(tmp_path, name)


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_name_that_no_file_system_takes_is_refused(name: str) -> None:
    assert "at most 200 are possible" in complaint(name)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("mine", "mine"),
        (" mine \n", "mine"),
        ("mine.safetensors", "mine"),
        ("wan/480p\\mine", "wan/480p/mine"),
        ("Wan 2.1 (14B), 16 layers", "Wan 2.1 (14B), 16 layers"),
        ("模型", "模型"),
        ("console", "console"),
        ("x" * 200, "x" * 200),
    ],
)
def test_a_plain_name_is_what_was_typed_without_its_ending(
    typed: str, name: str, tmp_path: Path
) -> None:
    assert check_name(typed) == name
    assert place_file(tmp_path, typed) == tmp_path.joinpath(*name.split("/")).with_name(
        name.split("/")[-1] + ".safetensors"
    )


def test_a_single_name_has_no_folders() -> None:
    assert check_name("my transfer", is_single=True) == "my transfer"
    for name in ("a/b", "a\\b", "con", "../a"):
        assert "without folders" in complaint(name, is_single=True)


def test_files_do_not_stand_where_folders_are_needed_nor_folders_for_files(tmp_path: Path) -> None:
    place_file(tmp_path, "mine").write_bytes(b"x")
    (tmp_path / "large" / "a.safetensors").mkdir(parents=True)
    for name, there in {
        "mine.safetensors/b/c": "'mine.safetensors' is a file",
        "large/a": "a folder has that name",
    }.items():
        with pytest.raises(ArtifactError, match=f"cannot be used, since {there}: give another"):
            place_file(tmp_path, name)
    assert place_file(tmp_path, "mine") == tmp_path / "mine.safetensors"
    assert place_file(tmp_path, "large/a", is_exact=False).is_dir()
    assert place_file(tmp_path, "large/a.safetensors/b").parent.is_dir()


@given(name=hostile)
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_every_name_can_be_written_inside_its_folder_or_is_refused(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    try:
        path = place_file(folder, name)
    except ArtifactError:
        complaint(name)
        return
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert os.listdir(tmp_path) == ["models"]
    assert [found for found in folder.rglob("*") if found.is_file()] == [path]
    shutil.rmtree(folder)


def test_a_folder_that_links_elsewhere_takes_files(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "models" / "large").symlink_to(tmp_path / "disk", target_is_directory=True)
    place_file(tmp_path / "models", "large/mine").write_bytes(b"x")
    assert (tmp_path / "disk" / "mine.safetensors").exists()
