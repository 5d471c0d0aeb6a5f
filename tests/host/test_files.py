"""LINVIDEO files as nodes."""

import contextlib
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import args
from linvideo_pack.linvideo_core.artifact import ArtifactError
from linvideo_pack.nodes import model_folder
from linvideo_pack.nodes.file_nodes import LinVideoLoad, LinVideoSave, LinVideoShowFile
from stage import complaint, own_folders
from stage import shipped as _shipped
from torch.utils._pytree import tree_leaves
from utils.extra_config import load_extra_path_config

# Previews that nodes leave for the browser go with this process.
_PREVIEWS = tempfile.TemporaryDirectory()
folder_paths.set_temp_directory(_PREVIEWS.name)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder in place of models/linvideo."""
    with own_folders() as folder:
        yield folder / "models"


def _save(name: str, *, overwrite: bool = False) -> str:
    return LinVideoSave.execute(_shipped(), name, overwrite).result[0]


def test_what_is_saved_is_what_is_loaded() -> None:
    with _folder() as folder:
        for name in ("mine", "wan/480p\\mine"):
            shown = str(Path(*name.replace("\\", "/").split("/"))) + ".safetensors"
            assert _save(name) == shown and shown in model_folder.list_files()
            assert (folder / shown).is_file()
            (loaded,) = LinVideoLoad.execute(shown).result
            assert loaded.header == _shipped().header
            for kind in ("linear", "low_rank"):
                found, expected = (getattr(each, kind) for each in (loaded, _shipped()))
                assert found.keys() == expected.keys()
                assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


def test_a_file_is_never_replaced_unless_asked() -> None:
    with _folder() as folder:
        names = [_save("mine"), _save("mine"), _save("mine.safetensors")]
        assert names == [f"mine{n}.safetensors" for n in ("", "_00001_", "_00002_")]
        (folder / "mine.safetensors").write_bytes(b"old")
        assert _save("mine", overwrite=True) == "mine.safetensors"
        assert (folder / "mine.safetensors").stat().st_size > 1000
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_name_that_leads_out_or_is_none_is_refused() -> None:
    bad = ["", " ", ".", "..", "../mine", "wan/../../mine", "..\\mine", "/mine", "C:\\mine", "a\0b"]
    bad += ["mine.", "con", "NUL.x", ".hidden", "a*b", "%date%", "x" * 300, ".safetensors", "a/ /b"]
    bad += ["~/x", "nul.safetensors", "é" * 200, "\udcff", " . ", "\u202egnp.x", "a\n b", "a//b"]
    with tempfile.TemporaryDirectory() as outside, _folder() as folder:
        for name in [*bad, f"{outside}/mine", f"/{outside}/mine", f"\\\\{outside[1:]}\\mine"]:
            assert "filename" in complaint(ArtifactError, _save, name), name
            assert "filename" in complaint(ArtifactError, model_folder.choose_prompts_path, name), (
                name
            )
        assert not list(folder.iterdir()) and not list(Path(outside).iterdir())
        assert not (folder.parent / "mine.safetensors").exists()


def test_what_stands_in_the_way_is_one_sentence() -> None:
    with _folder() as folder:
        (folder / "taken").write_bytes(b"")
        assert "'taken' is a file" in complaint(ArtifactError, _save, "taken/mine")
        (folder / "mine.safetensors").mkdir()
        assert _save("mine") == "mine_00001_.safetensors"
        message = complaint(ArtifactError, _save, "mine", overwrite=True)
        assert "a folder has that name" in message


def test_a_folder_that_is_gone_costs_its_own_files_alone() -> None:
    with _folder() as folder:
        _save("mine")
        assert "mine.safetensors" in model_folder.list_files()
        folder.rename(folder.with_name("moved"))
        try:
            assert model_folder.list_files() == [
                model_folder.SHIPPED,
                model_folder.SHIPPED_FEW_STEP,
            ]
            assert LinVideoLoad.execute(model_folder.SHIPPED).result[0].header == _shipped().header
            assert model_folder.fingerprint(model_folder.SHIPPED)
            assert "not in models/linvideo" in complaint(
                ArtifactError, model_folder.fingerprint, "mine.safetensors"
            )
            assert _save("again") == "again.safetensors" in model_folder.list_files()
        finally:
            shutil.rmtree(folder.with_name("moved"))


@contextlib.contextmanager
def _extra_paths(text: str) -> Iterator[Path]:
    """Start as with `--extra-model-paths-config`, in a folder; yield it."""
    known = folder_paths.folder_names_and_paths
    before = dict(known)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as undo:
        undo.callback(folder_paths.filename_list_cache.pop, model_folder.FOLDER, None)
        undo.callback(known.update, before)
        undo.callback(known.clear)
        undo.callback(setattr, folder_paths, "models_dir", folder_paths.models_dir)
        undo.callback(setattr, args, "extra_model_paths_config", args.extra_model_paths_config)
        folder_paths.models_dir = str(Path(name, "models"))
        known["loras"] = ([str(Path(name, "models", "loras"))], {".safetensors"})
        known.pop(model_folder.FOLDER, None)
        path = Path(name, "paths.yaml")
        path.write_text(text)
        args.extra_model_paths_config = [[str(path)]]
        load_extra_path_config(str(path))
        yield Path(name)


def test_the_folders_come_in_comfyuis_own_order() -> None:
    text = """
        searched: {loras: first/loras, linvideo: first/linvideo}
        default: {base_path: second, is_default: true, loras: loras, linvideo: linvideo}
        empty:
        lines:
          base_path: $HOME
          loras: |
            a/loras
            ~/b/loras
          linvideo: |
            a/linvideo
            ~/b/linvideo
        last: {is_default: true, linvideo: last/linvideo, loras: last/loras}
    """
    with _extra_paths(textwrap.dedent(text)) as folder:
        for _ in range(2):
            model_folder.register_folder()
            ours, loras = (
                folder_paths.get_folder_paths(kind) for kind in (model_folder.FOLDER, "loras")
            )
            assert ours == [path.replace("loras", "linvideo") for path in loras], ours
        assert ours[0] == str(folder / "last" / "linvideo")
        assert _save("mine") == "mine.safetensors" in model_folder.list_files()
        assert (folder / "last" / "linvideo" / "mine.safetensors").is_file()


def test_a_folder_that_is_only_searched_is_not_saved_into() -> None:
    with _extra_paths("searched: {linvideo: here}") as folder:
        model_folder.register_folder()
        expected = [str(folder / "models" / "linvideo"), str(folder / "here")]
        assert folder_paths.get_folder_paths(model_folder.FOLDER) == expected


def test_the_picture_is_an_image_and_the_words_name_the_layers() -> None:
    picture, text = LinVideoShowFile.execute(_shipped()).result
    assert picture.dtype == torch.float32 and picture.shape[::3] == (1, 3)
    assert 0 <= float(picture.min()) < 0.2 and float(picture.max()) == 1
    layers = ", ".join(map(str, _shipped().header.linear_layers))
    assert f"linear layers: {layers}" in text.splitlines()
