"""A real ComfyUI server with the pack in a folder of its own, driven over HTTP like a browser."""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linvideo_core.run.errors import SettingError

PACK = Path(__file__).parents[2]
START_SECONDS = 300
NODES = Path(__file__).parent / "comfyui_nodes"
CPU_FLAGS = ("--cpu", "--use-pytorch-cross-attention")

_FOLDERS = ("custom_nodes", "models/linvideo", "models/diffusion_models", "output", "user")
_STAGE = re.compile(r"LinVideo: (\w+): (\d+) \w+ in ([\d.]+) s")
_GRACE_SECONDS = 30
# Of prctl, PR_SET_PDEATHSIG.
_SET_DEATH_SIGNAL = 1
_ERROR_LENGTH = 400

Graph = Mapping[str, Mapping[str, Any]]


def read_version(root: Path) -> str:
    """Return the version of the ComfyUI in a folder; raise SettingError where there is none."""
    path = root / "comfyui_version.py"
    if not path.is_file():
        raise SettingError(
            f"{{comfyui}} {root} given, which holds no {path.name}; name the folder of a ComfyUI",
            "comfyui",
        )
    found = re.search(r"__version__ = [\"'](.+)[\"']", path.read_text(encoding="utf-8"))
    return found[1] if found else "of an unknown version"


class PromptError(ValueError):
    """What ComfyUI says of a graph that it refused, that failed, or that took too long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installation:
    """A ComfyUI checkout, the interpreter that has its requirements, a pack that loads GGUF.

    has_triton: whether what is loaded after ComfyUI itself finds Triton.
    """

    root: Path
    python: Path
    gguf_pack: Path | None = None
    has_triton: bool = True


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage of a transfer as the server's log tells it; seconds without pictures."""

    name: str
    count: int
    seconds: float


class Server:
    """A running ComfyUI, its own folder and its log."""

    def __init__(self, process: subprocess.Popen, address: str, folder: Path, log: Path) -> None:
        self.process, self.address, self.folder, self.log = process, address, folder, log

    @property
    def is_alive(self) -> bool:
        """Say whether the process still runs."""
        return self.process.poll() is None

    def has_node(self, kind: str) -> bool:
        """Say whether this ComfyUI has a node."""
        return kind in self.ask(f"/object_info/{kind}")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """GET a path, or POST a body to it, and return the JSON that comes back."""
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, kind)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"{}")

    def queue(self, graph: Graph) -> str:
        """Queue a graph and return its id; raise PromptError where the server refuses it."""
        try:
            return self.ask("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise PromptError(f"the graph was refused: {said[:_ERROR_LENGTH]}") from error

    def wait(self, prompt_id: str, deadline: float) -> dict[str, Any]:
        """Return the history of a queued graph once it has ended, well or not.

        deadline: in `time.monotonic` seconds; a graph that is not done by then is interrupted, and
        a server that does not heed it is stopped.

        Raises PromptError where the graph took too long or the server died.
        """
        while (history := self._history(prompt_id)) is None:
            if time.monotonic() > deadline:
                self._give_up(prompt_id)
                raise PromptError("the time limit was reached and the graph interrupted")
            time.sleep(0.05)
        return history

    def run(self, graph: Graph, deadline: float) -> dict[str, Any]:
        """Queue a graph and return its outputs.

        Raises PromptError where it is refused, fails or takes longer than `deadline`.
        """
        history = self.wait(self.queue(graph), deadline)
        if error := find_error(history):
            raise PromptError(error)
        return history["outputs"]

    def free_memory(self) -> None:
        """Let ComfyUI forget its models and results, as its own button does."""
        self.ask("/free", {"unload_models": True, "free_memory": True})

    def log_size(self) -> int:
        """Return the bytes of the log as it stands, for `stages`."""
        return self.log.stat().st_size

    def stages(self, since: int) -> list[Stage]:
        """Return the stages of transfers that were logged after so many bytes."""
        text = self.log.read_bytes()[since:].decode(errors="replace")
        return [Stage(name, int(n), float(s)) for name, n, s in _STAGE.findall(text)]

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        try:
            return self.ask(f"/history/{prompt_id}").get(prompt_id)
        except OSError as error:
            if self.is_alive:
                return None
            raise PromptError(f"the server died: {end_of(self.log)}") from error

    def _give_up(self, prompt_id: str) -> None:
        end = time.monotonic() + _GRACE_SECONDS
        with contextlib.suppress(OSError):
            self.ask("/interrupt", {})
        while self._history(prompt_id) is None:
            if time.monotonic() > end:
                self.process.kill()
                return
            time.sleep(0.2)


def find_error(history: Mapping[str, Any]) -> str:
    """Return in one line why a graph failed; "" where it did not."""
    for kind, what in history["status"]["messages"]:
        if kind == "execution_interrupted":
            return "the graph was interrupted"
        if kind == "execution_error":
            said = f"{what['node_type']}: {what['exception_type']}: {what['exception_message']}"
            return " ".join(said.split())[:_ERROR_LENGTH]
    return ""


def end_of(log: Path) -> str:
    """Return the last lines of a log in one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-4:])[-_ERROR_LENGTH:]


@contextlib.contextmanager
def run_server(
    installation: Installation, folder: Path, log: Path, flags: tuple[str, ...]
) -> Iterator[Server]:
    """Start a server whose every folder is inside one, and stop it in the end.

    Raises PromptError, with the end of its log, where it does not start.
    """
    _lay_out(installation, folder)
    port = _find_free_port()
    words = ["--base-directory", folder, "--port", port, "--database-url", "sqlite:///:memory:"]
    command = [installation.python, "main.py", *words, "--disable-api-nodes", *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=installation.root,
            env=_make_environment(installation),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    server = Server(process, f"http://127.0.0.1:{port}", folder, log)
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Let Linux end this process, too, when what started it is killed."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def _make_environment(installation: Installation) -> dict[str, str]:
    """Return ComfyUI's environment: our own folder on the path would hide its modules."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [folder for folder in folders if folder and Path(folder).resolve() != PACK.resolve()]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
    environment.pop("PYTHONSAFEPATH", None)
    if not installation.has_triton:
        environment["LINVIDEO_BENCHMARK_WITHOUT_TRITON"] = "1"
    return {**environment, "PYTHONPATH": os.pathsep.join(kept)}


def _lay_out(installation: Installation, folder: Path) -> None:
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    packs = {"LinVideo": PACK, "LinVideoBenchmarks": NODES}
    if installation.gguf_pack is not None:
        packs[installation.gguf_pack.name] = installation.gguf_pack
    for name, target in packs.items():
        link = folder / "custom_nodes" / name
        if not link.is_symlink():
            link.symlink_to(target.absolute(), target_is_directory=True)


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _wait_until_it_answers(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.is_alive:
        with contextlib.suppress(OSError):
            server.ask("/system_stats")
            return
        time.sleep(0.2)
    raise PromptError(
        f"ComfyUI did not start: {end_of(server.log)}; is --python an interpreter that has its "
        "requirements?"
    )
