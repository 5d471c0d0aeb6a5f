"""A write takes the place of what was there as a whole, or leaves it as it was."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linvideo_core.run.files import replacing, write_tensors, write_text


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "earlier")
    sentence = r"could not write .*a\.txt .*the earlier file, if any, is intact"
    with pytest.raises(OSError, match=sentence), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    with pytest.raises(RuntimeError), replacing(path):
        raise RuntimeError
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_an_impossible_place_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_text(tmp_path / "missing" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_tensors(tmp_path / "folder", {"x": torch.ones(1)})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_text(tmp_path / "a.txt", "x")
    write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_is_synced_was_opened_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(os, "fsync", lambda handle: written.append(os.write(handle, b"")))
    write_text(tmp_path / "a.txt", "x")
    assert written == [0]


def test_tensors_come_back_from_any_layout(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)
