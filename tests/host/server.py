"""A real ComfyUI server with the pack in its custom_nodes, driven over HTTP like a browser."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.process import FLAGS, PACK, Host, HostError, make_environment, name_device

SHIPPED = PACK / "linvideo_core" / "demo" / "weights" / "linearized.safetensors"
START_SECONDS, WORKFLOW_SECONDS = 600, 300
"""Only what hangs may reach these: a test that is slow on a busy machine has not failed."""


class Server:
    """A running ComfyUI and the folder that it lives in.

    process: its own, once it was started.
    """

    process: subprocess.Popen

    def __init__(self, host: Host, port: int, folder: Path) -> None:
        self.host = host
        self.address = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.log = folder / "log.txt"
        self.first_answer: dict[str, Any] = {}
        self.first_seconds = 0.0

    def read(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """GET a path, or POST a body to it, and return what comes back."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read()

    @property
    def version(self) -> str:
        """ComfyUI's own."""
        return self.ask("/system_stats")["system"]["comfyui_version"]

    @property
    def device(self) -> str:
        """Where ComfyUI computes, as tables name it."""
        return name_device(self.ask("/system_stats")["devices"][0]["name"])

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET a path, or POST a body to it, and return the JSON that comes back."""
        return json.loads(self.read(path, body) or "{}")

    def queue(
        self, workflow: dict[str, Any], *, seconds: float = WORKFLOW_SECONDS
    ) -> dict[str, Any]:
        """Run a workflow in API format and return what became of it."""
        return self.wait(self.ask("/prompt", {"prompt": workflow})["prompt_id"], seconds)

    def queue_first(self, workflow: dict[str, Any]) -> None:
        """Run what users queue first, and keep what became of it: it loads what later runs need."""
        start = time.monotonic()
        self.first_answer = self.queue(workflow)
        self.first_seconds = round(time.monotonic() - start, 1)

    def forget(self) -> None:
        """Drop models and what earlier runs computed: all of the next workflow is run."""
        self.ask("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.5)  # one that is queued at once would come first

    def wait(self, prompt_id: str, seconds: float) -> dict[str, Any]:
        """Return what became of a queued workflow."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.ask(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        pytest.fail(f"the workflow took longer than {seconds} s")


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_it_answers(server: Server, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            server.ask("/system_stats")
            return
        time.sleep(0.2)
    raise HostError(f"ComfyUI's server did not start:\n{server.log.read_text()[-4000:]}")


@contextlib.contextmanager
def run_server(host: Host, folder: Path) -> Iterator[Server]:
    """Start a server whose every folder is inside one, new or of an earlier server; stop it.

    There is a damaged file among its models.
    """
    for name in ("custom_nodes", "models/linvideo", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "custom_nodes" / "LinVideo").exists():
        (folder / "custom_nodes" / "LinVideo").symlink_to(PACK, target_is_directory=True)
    cut = folder / "models" / "linvideo" / "cut.safetensors"
    cut.write_bytes(SHIPPED.read_bytes()[:9999])
    server = Server(host, find_free_port(), folder)
    flags = [*FLAGS, "--base-directory", str(folder)]
    flags += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    flags += ["--port", server.address.rpartition(":")[2]]
    with server.log.open("w") as output:
        process = server.process = subprocess.Popen(
            [str(host.python), "main.py", *flags],
            cwd=host.root,
            env=make_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_it_answers(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=120)
