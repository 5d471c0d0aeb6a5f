"""Names that people type for files: each leads to a place inside its folder, or is refused."""

import os
import re
from pathlib import Path

from .header import ArtifactError

SUFFIX = ".safetensors"

# File systems take 255 bytes a part; an ending and a number are still added.
_MAX_BYTES = 200
_MAX_SHOWN = 100
# What some system's file names cannot hold; "%" starts what ComfyUI replaces in names.
_FORBIDDEN = re.compile(r'[<>:"|?*%]')
# Nothing at all, a way up, a hidden file, a home folder, what Windows cuts off, its devices.
_BAD_PART = re.compile(
    r"|[. ~].*|.*[. ]|(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE
)


def check_name(name: str, *, is_single: bool = False) -> str:
    """Return a name that was typed as folder/name, with or without its ending, as folder/name.

    is_single: no folders before the name.

    Raises ArtifactError, in one sentence, when on some system it leads out of its folder or cannot
    be a file's name.
    """
    stem = name.strip().replace("\\", "/").removesuffix(SUFFIX)
    parts = stem.split("/")
    is_plain = stem.isprintable() and not _FORBIDDEN.search(stem)
    if not is_plain or any(map(_BAD_PART.fullmatch, parts)) or (is_single and len(parts) > 1):
        raise _refused(name, is_single)
    if (size := len(stem.encode())) > _MAX_BYTES:
        raise ArtifactError(
            f"the filename {_show(name)} is {size} bytes long; at most {_MAX_BYTES} are possible: "
            "give a shorter one"
        )
    return stem


def place_file(folder: Path, name: str) -> Path:
    """Return where in a folder the file of a name lies, or would lie; see `check_name`.

    Raises ArtifactError as `check_name` does.
    """
    path = folder / (check_name(name) + SUFFIX)
    # Without following links: a folder of one's own may lie on another disk.
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise _refused(name, is_single=False)
    return path


def _refused(name: str, is_single: bool) -> ArtifactError:
    others = ", without folders" if is_single else ", or folder/my_model"
    return ArtifactError(
        f"the filename {_show(name)} cannot be used: give a plain name such as my_model{others}"
    )


def _show(name: str) -> str:
    return repr(name)[:_MAX_SHOWN]
