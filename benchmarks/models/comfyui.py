"""Measure inside ComfyUI: a process of its own that sees ComfyUI's modules and loads the pack.

The core imports neither ComfyUI nor the nodes: it starts the nodes' script by its path.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linvideo_core.run.files import write_json
from linvideo_core.run.progress import Progress

PACK = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("comfyui_process.py")
PROGRESS = "linvideo progress "

_VERSION = "comfyui_version.py"
_NEEDED = ("comfy/ldm/wan/model.py", "comfy/sample.py", _VERSION)
_LOG_LINES = 3


def read_version(root: Path) -> str:
    """Return the version of the ComfyUI in a folder.

    Raises ValueError, in one sentence, where there is none.
    """
    if missing := [name for name in _NEEDED if not (root / name).is_file()]:
        raise ValueError(
            f"--comfyui {root} given, which holds no {missing[0]}; name the folder of a ComfyUI"
        )
    text = (root / _VERSION).read_text(encoding="utf-8")
    found = re.search(r"__version__ = [\"'](.+)[\"']", text)
    return found[1] if found else "of an unknown version"


def measure_in_host(
    root: Path, python: Path | None, job: Mapping[str, Any], folder: Path, progress: Progress
) -> None:
    """Run a job of `comfyui_worker.py` inside a ComfyUI; it writes its own results.

    python: the interpreter that has ComfyUI's requirements; none: this one.
    job: as JSON gives it back. Its process's output is kept beside the job, in `folder`.

    Raises ChildProcessError, with the end of that output, where the process fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_path, log_path = folder / "comfyui_job.json", folder / "comfyui.log"
    write_json(job_path, dict(job))
    command = [str(python or sys.executable), str(SCRIPT), str(job_path.absolute())]
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            cwd=root,
            env=make_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    state = json.loads(line.removeprefix(PROGRESS))
                    progress(state["stage"], state["done"], state["total"])
                else:
                    log.write(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = [line for line in log_path.read_text(encoding="utf-8").splitlines() if line.strip()]
        raise ChildProcessError(
            f"measuring inside ComfyUI ended with status {process.returncode}; the end of "
            f"{log_path}: {' / '.join(said[-_LOG_LINES:])}"
        )


def make_environment() -> dict[str, str]:
    """Return ComfyUI's environment: our own folder on the path would hide its modules."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [folder for folder in folders if folder and Path(folder).resolve() != PACK.resolve()]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**environment, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(kept)}
