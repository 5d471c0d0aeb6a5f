"""Find a real ComfyUI and run functions inside it, each in a process that sees ComfyUI alone."""

import inspect
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host.flags import FLAGS, make_environment
from tests.host.recording import pytest_addoption, pytest_configure
from tests.host.server import server

__all__ = ["pytest_addoption", "pytest_configure", "server"]

TIMEOUT_SECONDS = 1800
PACK = Path(__file__).parents[2]
START = """
import comfy.options
comfy.options.enable_args_parsing()
from comfy.cli_args import args
if not args.cpu:  # the allocator and the dynamic video memory that ComfyUI starts with on a GPU
    import cuda_malloc
    import main
"""


class Host:
    """A ComfyUI checkout and the interpreter that has its requirements."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self.python = python

    def examine(self, laws: Path, results: Path) -> None:
        """Run every function of a file of laws inside ComfyUI, which has loaded the pack.

        A law that needs a newer ComfyUI raises `unittest.SkipTest`, saying which.

        results: written as JSON, for each law's name {}, {"failed": why} or {"skipped": why}.
        """
        print(self.call(run_laws, str(PACK), str(laws), str(results)))

    def call(self, function: Callable[..., None], *arguments: str | int | float) -> str:
        """Run a self-contained function in ComfyUI's own process and return what it printed.

        The function travels as source text, so it must import what it uses; its arguments must
        survive `repr`. The process starts in ComfyUI's folder without PYTHONPATH: the only
        `nodes` it can import is ComfyUI's.
        """
        call = f"{function.__name__}(*{arguments!r})"
        source = "\n".join((START, textwrap.dedent(inspect.getsource(function)), call))
        finished = subprocess.run(
            [str(self.python), "-c", source, *FLAGS],
            cwd=self.root,
            env=make_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        if finished.returncode:
            pytest.fail(
                f"{function.__name__} failed inside ComfyUI ({self.root}), exit status "
                f"{finished.returncode}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}",
                pytrace=False,
            )
        return finished.stdout


def run_laws(pack: str, laws: str, results: str) -> None:
    """Load the pack as ComfyUI does, then run a file's functions; runs in ComfyUI's process."""
    import importlib.util
    import json
    import sys
    import traceback
    import unittest
    from pathlib import Path

    import comfy.model_management
    import torch

    # ComfyUI's matrix products are full fp32. With TF32 a convolution's have 11 bits, in which
    # much of what laws look for would be lost.
    torch.backends.cudnn.allow_tf32 = False

    def load(name: str, path: Path, folders: list[str] | None) -> object:
        spec = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=folders
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def end_node() -> None:
        """Let go of what dynamic video memory keeps for a node, as ComfyUI does after each."""
        memory = sys.modules.get("comfy.memory_management")
        if getattr(memory, "aimdo_enabled", False):
            import comfy_aimdo.model_vbar

            comfy.model_management.reset_cast_buffers()
            comfy_aimdo.model_vbar.vbars_reset_watermark_limits()

    sys.path.append(str(Path(laws).parent))  # what files of laws share
    load("linvideo_pack", Path(pack) / "__init__.py", [pack])
    module = load("laws", Path(laws), None)
    outcomes = {}
    for name, law in list(vars(module).items()):
        if getattr(law, "__module__", "") == "laws" and not name.startswith("_"):
            outcomes[name] = {}
            try:
                with torch.inference_mode():  # as ComfyUI runs nodes
                    law()
            except unittest.SkipTest as missing:
                outcomes[name]["skipped"] = str(missing)
            except Exception:
                outcomes[name]["failed"] = traceback.format_exc()
            end_node()
    Path(results).write_text(json.dumps(outcomes))


def find_python(root: Path) -> Path | None:
    """Return the interpreter named by COMFYUI_PYTHON, else the one in the checkout's venv."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named).expanduser()
    candidates = [
        root / folder / binary
        for folder in ("venv", ".venv")
        for binary in ("bin/python", "Scripts/python.exe")
    ]
    return next((python for python in candidates if python.is_file()), None)


@pytest.fixture(scope="session")
def host() -> Host:
    """The real ComfyUI: a missing default skips, a wrong COMFYUI_PATH or _PYTHON fails."""
    refuse = (
        pytest.fail
        if os.environ.get("COMFYUI_PATH") or os.environ.get("COMFYUI_PYTHON")
        else pytest.skip
    )
    root = Path(os.environ.get("COMFYUI_PATH") or "~/ComfyUI").expanduser().absolute()
    if not (root / "comfy" / "ldm" / "wan" / "model.py").is_file():
        refuse(
            f"no ComfyUI checkout in {root}: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to "
            "an interpreter that has its requirements"
        )
    python = find_python(root)
    if python is None or not python.is_file():
        refuse(
            f"no Python interpreter for the ComfyUI checkout in {root} "
            f"({python or 'no venv in it'}): set COMFYUI_PYTHON to one that has its requirements"
        )
    return Host(root, python)
