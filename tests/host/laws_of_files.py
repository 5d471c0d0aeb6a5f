"""Laws of LINVIDEO files as nodes, each a function that runs inside ComfyUI, for `test_laws`."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import torch
from linvideo_pack.linvideo_core.artifact import ArtifactError
from linvideo_pack.nodes import demo, files
from linvideo_pack.nodes.file_nodes import LinVideoLoad, LinVideoSave, LinVideoShowFile
from linvideo_pack.nodes.linearize import APPLY, APPLY_INPUT, LinVideoLinearize
from stage import shipped as _shipped

# Previews that nodes leave for the browser go with this process.
_PREVIEWS = tempfile.TemporaryDirectory()
folder_paths.set_temp_directory(_PREVIEWS.name)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder in place of models/linvideo."""
    kept = folder_paths.folder_names_and_paths.get(files.FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths[files.FOLDER] = ([folder], {".safetensors"})
        try:
            yield Path(folder)
        finally:
            folder_paths.folder_names_and_paths.pop(files.FOLDER)
            folder_paths.filename_list_cache.pop(files.FOLDER, None)
            if kept is not None:
                folder_paths.folder_names_and_paths[files.FOLDER] = kept


def _save(name: str, *, overwrite: bool = False) -> str:
    return LinVideoSave.execute(_shipped(), name, overwrite).result[0]


def _complaint(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except ArtifactError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 400, message
        return message
    raise AssertionError("nothing was refused")


def what_is_saved_is_what_is_loaded() -> None:
    with _folder():
        name = _save("mine")
        assert name == "mine.safetensors" and name in files.list_files()
        (loaded,) = LinVideoLoad.execute(name).result
    assert loaded.header == _shipped().header
    for kind in ("feature_maps", "low_rank"):
        kept, expected = getattr(loaded, kind), getattr(_shipped(), kind)
        assert kept.keys() == expected.keys()
        for name, pair in expected.items():
            assert all(map(torch.equal, kept[name], pair))


def a_file_is_never_replaced_unless_asked() -> None:
    with _folder() as folder:
        names = [_save("mine"), _save("mine"), _save("mine.safetensors")]
        assert names == [f"mine{n}.safetensors" for n in ("", "_00001_", "_00002_")]
        (folder / "mine.safetensors").write_bytes(b"old")
        assert _save("mine", overwrite=True) == "mine.safetensors"
        assert (folder / "mine.safetensors").stat().st_size > 1000
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def folders_in_a_name_are_made() -> None:
    with _folder() as folder:
        name = str(Path("wan", "480p", "mine.safetensors"))
        assert _save("wan/480p\\mine") == name and name in files.list_files()
        assert (folder / "wan" / "480p" / "mine.safetensors").is_file()
        (loaded,) = LinVideoLoad.execute(name).result
        assert loaded.header == _shipped().header


def a_name_that_leads_out_or_is_none_is_refused() -> None:
    bad = ["", " ", ".", "..", "../mine", "wan/../../mine", "..\\mine", "/mine", "C:\\mine", "a\0b"]
    bad += ["mine.", "con", "NUL.x", ".hidden", "a*b", "%date%", "x" * 300, ".safetensors", "a/ /b"]
    with tempfile.TemporaryDirectory() as outside, _folder() as folder:
        for name in [*bad, f"{outside}/mine"]:
            assert "filename" in _complaint(_save, name), name
        assert not list(folder.iterdir()) and not list(Path(outside).iterdir())
        assert not (folder.parent / "mine.safetensors").exists()


def a_folder_that_cannot_be_made_is_one_sentence() -> None:
    with _folder() as folder:
        (folder / "taken").write_bytes(b"")
        assert "cannot be made" in _complaint(_save, "taken/mine")


def the_picture_is_an_image_and_the_words_name_the_layers() -> None:
    picture, text = LinVideoShowFile.execute(_shipped()).result
    assert picture.dtype == torch.float32 and picture.shape[::3] == (1, 3)
    assert 0 <= float(picture.min()) < 0.2 and float(picture.max()) == 1
    layers = ", ".join(map(str, _shipped().header.layers))
    assert f"linear layers: {layers}" in text.splitlines()


def a_connected_file_gives_the_same_latents_as_a_chosen_one() -> None:
    model, positive, negative, latent = demo.LinVideoDemo.execute("three", "left", 1).result
    noise = comfy.sample.prepare_noise(latent["samples"], 1)
    modes = (
        {"mode": APPLY, "file": files.SHIPPED, "strength": 0.5, "keep_first_steps": 0},
        {"mode": APPLY_INPUT, "linvideo": _shipped(), "strength": 0.5, "keep_first_steps": 0},
    )
    samples, reports = [], []
    for mode in modes:
        linearized, applied, report = LinVideoLinearize.execute(model, mode).result
        assert applied.header == _shipped().header
        settings = (2, 3.0, "euler", "simple", positive, negative, latent["samples"])
        samples.append(comfy.sample.sample(linearized, noise, *settings, seed=1, disable_pbar=True))
        reports.append(report)
    assert torch.equal(*samples)
    assert torch.equal(*reports)


def the_report_says_the_strength() -> None:
    model = demo.LinVideoDemo.execute("three", "left", 1).result[0]
    weak, strong = (
        LinVideoLinearize.execute(
            model,
            {"mode": APPLY, "file": files.SHIPPED, "strength": strength, "keep_first_steps": 0},
        ).result[2]
        for strength in (0.5, 1.0)
    )
    assert weak.shape[2:] == (1024, 3) and not torch.equal(weak, strong)
