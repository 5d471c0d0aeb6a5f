"""Where LINVIDEO files lie: `models/linvideo/`, the demo's own two in the pack; how one looks."""

import contextlib
import itertools
import os
from pathlib import Path

import folder_paths
import numpy as np
import torch
import yaml
from comfy.cli_args import args
from torch import Tensor

from ..linvideo_core.artifact import Artifact, ArtifactError
from ..linvideo_core.artifact.file import SUFFIX, place_file
from ..linvideo_core.artifact.summary import draw_summary
from ..linvideo_core.demo import weights_path
from ..linvideo_core.run.files import sweep

FOLDER = "linvideo"
SHIPPED = "demo (comes with LinVideo)"
SHIPPED_FEW_STEP = "demo in 4 steps (comes with LinVideo)"

_SHIPPED_PATHS = {
    SHIPPED: weights_path("linearized.safetensors"),
    SHIPPED_FEW_STEP: weights_path("distilled.safetensors"),
}


def register_folder() -> None:
    """Tell ComfyUI of `models/linvideo/`, among the folders from extra_model_paths.yaml.

    The first folder is the one that is saved into: a default one of the file, else ours.
    """
    own = str(Path(folder_paths.models_dir) / FOLDER)
    found, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    defaults = _default_folders() if found else set()
    first = [folder for folder in found if folder in defaults]
    folders = list(dict.fromkeys([*first, own, *found]))
    folder_paths.folder_names_and_paths[FOLDER] = (folders, {SUFFIX})
    with contextlib.suppress(OSError):
        Path(own).mkdir(exist_ok=True)


def list_files() -> list[str]:
    """Return the names for a drop-down, the shipped files first."""
    try:
        found = folder_paths.get_filename_list(FOLDER)
    except OSError:
        # ComfyUI remembers the folders of its last list, and one of them is gone.
        folder_paths.filename_list_cache.pop(FOLDER, None)
        found = folder_paths.get_filename_list(FOLDER)
    return [*_SHIPPED_PATHS, *found]


def find_file(name: str) -> Path:
    """Return the path of a name from `list_files`.

    Raises ArtifactError when the file is gone.
    """
    if name in _SHIPPED_PATHS:
        return _SHIPPED_PATHS[name]
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ArtifactError(f"{name} is not in models/{FOLDER}: choose a file that is there")
    return Path(path)


def fingerprint(name: str) -> str:
    """Return what changes when the file of a name is replaced by another."""
    status = find_file(name).stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def choose_path(name: str, *, overwrite: bool) -> Path:
    """Return where in models/linvideo to write a file, its folder made.

    overwrite: take the name even if there is such a file; otherwise a number is added, as ComfyUI
        numbers its own.

    Raises ArtifactError when the name leads out of the folder or cannot be a file's name.
    """
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    path = _make_place(folder, name, is_exact=overwrite)
    return path if overwrite else _find_free(path)


def choose_prompts_path(name: str) -> Path:
    """Return where in ComfyUI's output folder prompt embeddings of a name lie, its folder made.

    Raises ArtifactError as `choose_path` does.
    """
    return _make_place(Path(folder_paths.get_output_directory(), FOLDER), name, is_exact=True)


def shown_name(path: Path) -> str:
    """Return a file's name as the drop-downs show it."""
    return str(path.relative_to(folder_paths.get_folder_paths(FOLDER)[0]))


def _default_folders() -> set[str]:
    """Return our folders of extra_model_paths.yaml that it marks as default.

    ComfyUI itself heeds the mark only where a kind of model has a folder already when the file is
    read; ours comes later.
    """
    usual = Path(folder_paths.__file__).with_name("extra_model_paths.yaml")
    given = map(Path, itertools.chain(*(args.extra_model_paths_config or [])))
    return {
        os.path.normpath(folder)
        for file in (usual, *given)
        if file.is_file()
        for section in yaml.safe_load(file.read_text(encoding="utf-8")).values()
        if section and section.get("is_default")
        for folder in _folders_of(section, file.absolute().parent)
    }


def _folders_of(section: dict[str, str], beside: Path) -> list[Path]:
    """Return the folders of ours that a section of extra_model_paths.yaml lists, a line each."""
    base = os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
    return [beside / base / line for line in section.get(FOLDER, "").split("\n") if line]


def _make_place(folder: Path, name: str, *, is_exact: bool) -> Path:
    path = place_file(folder, name, is_exact=is_exact)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise ArtifactError(f"the folder {path.parent} cannot be made ({error})") from error
    return path


def _find_free(path: Path) -> Path:
    """Return the path, or if it is taken the first with a number that is not."""
    numbered = (path.with_name(f"{path.stem}_{i:05}_{SUFFIX}") for i in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not os.path.lexists(each))


def show_summary(artifact: Artifact, *, note: str = "") -> Tensor:
    """Draw an artifact as an IMAGE [1, H, W, 3] fp32, 0 to 1; `note` stands at its foot."""
    picture = np.array(draw_summary(artifact, note=note))
    return torch.from_numpy(picture).float().div(255)[None]
