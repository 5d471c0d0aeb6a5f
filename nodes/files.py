"""Where LINVIDEO files lie: `models/linvideo/`, and the demo's own two in the pack."""

import contextlib
import re
from pathlib import Path, PurePosixPath
from typing import NoReturn

import folder_paths

from ..linvideo_core.artifact import ArtifactError
from ..linvideo_core.demo import weights_path

FOLDER = "linvideo"
SHIPPED = "demo (comes with LinVideo)"
SHIPPED_FEW_STEP = "demo in 4 steps (comes with LinVideo)"

_SUFFIX = ".safetensors"
_SHIPPED_PATHS = {
    SHIPPED: weights_path("linearized.safetensors"),
    SHIPPED_FEW_STEP: weights_path("distilled.safetensors"),
}
_MAX_NAME = 200
# What some system's file names cannot hold, device names and a folder's way up included.
_FORBIDDEN = re.compile(r'[<>:"|?*%\x00-\x1f]')
_BAD_PART = re.compile(r"\.+|.*[. ]|[ .].*|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def register_folder() -> None:
    """Tell ComfyUI of `models/linvideo/`; folders from extra_model_paths.yaml are kept."""
    own = str(Path(folder_paths.models_dir) / FOLDER)
    folders, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folders = folders if own in folders else [own, *folders]
    folder_paths.folder_names_and_paths[FOLDER] = (folders, {_SUFFIX})
    with contextlib.suppress(OSError):
        Path(own).mkdir(exist_ok=True)


def list_files() -> list[str]:
    """Return the names for a drop-down, the shipped files first."""
    return [*_SHIPPED_PATHS, *folder_paths.get_filename_list(FOLDER)]


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
    prefix, root = check_name(name), folder_paths.get_folder_paths(FOLDER)[0]
    path = Path(root, prefix + _SUFFIX)
    _make_folder(path.parent)
    if path.exists() and not overwrite:
        folder, stem, counter, *_ = folder_paths.get_save_image_path(prefix, root)
        path = Path(folder, f"{stem}_{counter:05}_{_SUFFIX}")
    return path


def choose_prompts_path(name: str) -> Path:
    """Return where in ComfyUI's output folder prompt embeddings of a name lie, or would lie.

    Raises ArtifactError as `choose_path` does.
    """
    return Path(folder_paths.get_output_directory(), FOLDER, check_name(name) + _SUFFIX)


def check_name(name: str) -> str:
    """Return a filename that was typed as folder/name without its ending.

    Raises ArtifactError when the name leads out of the folder or cannot be a file's name.
    """
    parts = PurePosixPath(name.strip().replace("\\", "/").removesuffix(_SUFFIX)).parts
    if not parts or len(name) > _MAX_NAME or _FORBIDDEN.search(name):
        _refuse_name(name)
    if any(part == "/" or _BAD_PART.fullmatch(part) for part in parts):
        _refuse_name(name)
    return "/".join(parts)


def shown_name(path: Path) -> str:
    """Return a file's name as the drop-downs show it."""
    return str(path.relative_to(folder_paths.get_folder_paths(FOLDER)[0]))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"the folder {folder} cannot be made ({error})") from error


def _refuse_name(name: str) -> NoReturn:
    raise ArtifactError(
        f"the filename {name[:_MAX_NAME]!a} cannot be used: give a plain name such as my_model, or "
        "folder/my_model"
    )
