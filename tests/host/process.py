"""A real ComfyUI: its checkout, its interpreter, and one process of it that runs tests.

LINVIDEO_HOST_FLAGS="" python -m pytest tests/host           # as ComfyUI starts by itself
LINVIDEO_HOST_FLAGS="--novram" python -m pytest tests/host
"""

import inspect
import json
import os
import selectors
import shlex
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("inside.py")
ANSWER_SECONDS = 1200
"""Only what hangs may reach this."""

VARIABLE = "LINVIDEO_HOST_FLAGS"
ON_A_CPU = ("--cpu", "--use-pytorch-cross-attention")
FLAGS = ON_A_CPU if VARIABLE not in os.environ else tuple(shlex.split(os.environ[VARIABLE]))

TESTS_OWN = ("PYTHONPATH", "TRITON_INTERPRET")
"""Environment variables that the host must not inherit from the tests."""
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Waiting threads sleep: spinning, two processes on two cores hold each other up for minutes."""


def make_environment() -> dict[str, str]:
    """Return the environment variables of ComfyUI's processes."""
    return {k: v for k, v in os.environ.items() if k not in TESTS_OWN} | PATIENT


def name_device(name: str) -> str:
    """Return a device as tables name it, with the flags if they are not the usual ones.

    name: as ComfyUI's /system_stats has it, such as "cpu" or "cuda:0 NVIDIA H100 : native".
    """
    model = name.partition(" : ")[0]
    if model.startswith("cuda:"):
        model = model.partition(" ")[2]
    return model if FLAGS in ((), ON_A_CPU) else f"{model} {' '.join(FLAGS)}"


class HostError(Exception):
    """ComfyUI is not there, or cannot start: why, in its own words.

    is_missing: no ComfyUI was named and the usual place has none.
    """

    def __init__(self, words: str, *, is_missing: bool = False) -> None:
        super().__init__(words)
        self.is_missing = is_missing
        self.is_told = False


class Host:
    """A ComfyUI checkout, the interpreter that has its requirements, and a process of them.

    The process starts in ComfyUI's folder without PYTHONPATH: the only `nodes` that it can import
    is ComfyUI's.
    """

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self.python = python
        self._process: subprocess.Popen | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.described = self._start()
        """What `describe` of `inside.py` returns there."""

    def _start(self) -> dict[str, Any]:
        source = f"PACK = {str(PACK)!r}\n{PROGRAM.read_text(encoding='utf-8')}"
        self._process = subprocess.Popen(
            [str(self.python), "-c", source, *FLAGS],
            cwd=self.root,
            env=make_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        if (said := self._read_answer()) is None:
            raise HostError(f"ComfyUI in {self.root} did not start:\n{self._read_log()}")
        return said

    def ask(self, **request: Any) -> dict[str, str]:
        """Let ComfyUI's process answer a request of `inside.py`, in a new one if the last died."""
        if self._process is None:
            self._start()
        print(json.dumps(request), file=self._process.stdin, flush=True)
        if (answer := self._read_answer()) is None:
            words = f"ComfyUI's process ended or hung:\n{self._read_log()}"
            return {"outcome": "failed", "words": words, "printed": ""}
        return answer

    def call(self, function: Callable[..., None], *arguments: str | int | float) -> None:
        """Run a self-contained function in ComfyUI's process: it travels as source text."""
        source = textwrap.dedent(inspect.getsource(function))
        answer = self.ask(source=source, function=function.__name__, arguments=arguments)
        if answer["outcome"] != "passed":
            pytest.fail(answer["words"], pytrace=False)

    def stop(self) -> None:
        """End the process, if one runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _read_answer(self) -> dict[str, Any] | None:
        """Return what the process says next; None when it has ended, or says nothing for long."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = selector.select(ANSWER_SECONDS) and self._process.stdout.readline()
        if not line:
            self.stop()
            return None
        return json.loads(line)

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]


def find_host() -> Host:
    """Start the ComfyUI that COMFYUI_PATH and COMFYUI_PYTHON name, or the one in ~/ComfyUI."""
    is_named = bool(os.environ.get("COMFYUI_PATH") or os.environ.get("COMFYUI_PYTHON"))
    root = Path(os.environ.get("COMFYUI_PATH") or "~/ComfyUI").expanduser().absolute()
    if not (root / "comfy" / "ldm" / "wan" / "model.py").is_file():
        raise HostError(
            f"no ComfyUI checkout in {root}: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to "
            "an interpreter that has its requirements",
            is_missing=not is_named,
        )
    python = find_python(root)
    if python is None or not python.is_file():
        raise HostError(
            f"no Python interpreter for the ComfyUI checkout in {root} "
            f"({python or 'no venv in it'}): set COMFYUI_PYTHON to one that has its requirements",
            is_missing=not is_named,
        )
    return Host(root, python)


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
