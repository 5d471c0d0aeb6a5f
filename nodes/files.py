"""Where LINVIDEO files lie: `models/linvideo/`, and the demo's own in the pack."""

import contextlib
from pathlib import Path

import folder_paths

from ..linvideo_core.artifact import ArtifactError
from ..linvideo_core.demo import weights_path

FOLDER = "linvideo"
SHIPPED = "demo (comes with LinVideo)"


def register_folder() -> None:
    """Tell ComfyUI of `models/linvideo/`; folders from extra_model_paths.yaml are kept."""
    own = str(Path(folder_paths.models_dir) / FOLDER)
    folders, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folders = folders if own in folders else [own, *folders]
    folder_paths.folder_names_and_paths[FOLDER] = (folders, {".safetensors"})
    with contextlib.suppress(OSError):
        Path(own).mkdir(exist_ok=True)


def list_files() -> list[str]:
    """Return the names for a drop-down, the shipped file first."""
    return [SHIPPED, *folder_paths.get_filename_list(FOLDER)]


def find_file(name: str) -> Path:
    """Return the path of a name from `list_files`.

    Raises ArtifactError when the file is gone.
    """
    if name == SHIPPED:
        return weights_path("linearized.safetensors")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ArtifactError(f"{name} is not in models/{FOLDER}: choose a file that is there")
    return Path(path)
