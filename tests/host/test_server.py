"""A fresh ComfyUI server with the pack in its custom_nodes, driven over HTTP like a browser."""

import contextlib
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.host

PACK = Path(__file__).parents[2]
SHIPPED = PACK / "linvideo_core" / "demo" / "weights" / "linearized.safetensors"
START_SECONDS, WORKFLOW_SECONDS = 120, 60
FILE = "demo (comes with LinVideo)"

# Saved workflows hold these names: none may change or go.
NODES = {
    "LinVideoLinearize": {
        "inputs": {"model": "MODEL", "mode": "COMFY_DYNAMICCOMBO_V3"},
        "outputs": {"MODEL": "MODEL", "LINVIDEO": "LINVIDEO"},
    },
    "LinVideoDemo": {
        "inputs": {"digit": "COMBO", "direction": "COMBO", "batch_size": "INT"},
        "outputs": {
            "MODEL": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "LATENT": "LATENT",
        },
    },
    "LinVideoDemoDecode": {
        "inputs": {"samples": "LATENT", "upscale": "INT"},
        "outputs": {"IMAGE": "IMAGE"},
    },
}
MODES = {"apply a saved file": {"file": "COMBO", "strength": "FLOAT", "keep_first_steps": "INT"}}


class Server:
    """A running ComfyUI and the folder that it lives in."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.folder = folder

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET a path, or POST a body to it, and return the JSON that comes back."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def queue(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow in API format and return what became of it."""
        prompt_id = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        deadline = time.monotonic() + WORKFLOW_SECONDS
        while time.monotonic() < deadline:
            history = self.ask(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        pytest.fail(f"the workflow took longer than {WORKFLOW_SECONDS} s")


def make_workflow(file: str = FILE, *, strength: float = 1.0) -> dict[str, Any]:
    """Demo -> Linearize -> KSampler -> Demo Decode -> Save."""
    return {
        "demo": {
            "class_type": "LinVideoDemo",
            "inputs": {"digit": "three", "direction": "left", "batch_size": 1},
        },
        "linear": {
            "class_type": "LinVideoLinearize",
            "inputs": {
                "model": ["demo", 0],
                "mode": "apply a saved file",
                "mode.file": file,
                "mode.strength": strength,
                "mode.keep_first_steps": 0,
            },
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["linear", 0],
                "positive": ["demo", 1],
                "negative": ["demo", 2],
                "latent_image": ["demo", 3],
                "seed": 5,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "decode": {
            "class_type": "LinVideoDemoDecode",
            "inputs": {"samples": ["sampler", 0], "upscale": 4},
        },
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": "frames"},
        },
    }


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_it_answers(server: Server, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            server.ask("/system_stats")
            return
        time.sleep(0.2)
    pytest.fail(f"ComfyUI did not start:\n{log.read_text()[-4000:]}", pytrace=False)


@pytest.fixture(scope="module")
def server(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose every folder is a temporary one."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models/linvideo", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "LinVideo").symlink_to(PACK, target_is_directory=True)
    (folder / "models" / "linvideo" / "cut.safetensors").write_bytes(SHIPPED.read_bytes()[:9999])
    server = Server(find_free_port(), folder)
    flags = ["--cpu", "--use-pytorch-cross-attention", "--base-directory", str(folder)]
    flags += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    flags += ["--port", server.address.rpartition(":")[2]]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(host.python), "main.py", *flags],
            cwd=host.root,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_it_answers(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def types_of(inputs: dict[str, Any]) -> dict[str, str]:
    """Return the type of every input of an /object_info entry."""
    return {
        name: "COMBO" if isinstance(entry[0], list) else entry[0]
        for group in inputs.values()
        for name, entry in group.items()
    }


@pytest.mark.parametrize("node", NODES)
def test_ids_inputs_and_outputs_are_frozen(node: str, server: Server) -> None:
    described = server.ask(f"/object_info/{node}")[node]
    outputs = dict(zip(described["output_name"], described["output"], strict=True))
    assert {"inputs": types_of(described["input"]), "outputs": outputs} == NODES[node]
    assert described["category"] == "LinVideo"
    assert described["display_name"].startswith("LinVideo ")
    for group in described["input"].values():
        assert all(entry[1]["tooltip"] for entry in group.values())


def test_the_modes_and_their_inputs_are_frozen(server: Server) -> None:
    described = server.ask("/object_info/LinVideoLinearize")["LinVideoLinearize"]
    options = described["input"]["required"]["mode"][1]["options"]
    assert {option["key"]: types_of(option["inputs"]) for option in options} == MODES
    file = options[0]["inputs"]["required"]["file"]
    assert (file[0] if file[0] != "COMBO" else file[1]["options"]) == [FILE, "cut.safetensors"]


def test_the_demo_workflow_gives_frames(server: Server, record_property: Any) -> None:
    start = time.monotonic()
    answer = server.queue(make_workflow())
    record_property("workflow", "demo, shipped file applied")
    record_property("seconds", round(time.monotonic() - start, 1))
    record_property("comfyui", server.ask("/system_stats")["system"]["comfyui_version"])
    assert answer["status"]["status_str"] == "success", answer["status"]
    images = answer["outputs"]["save"]["images"]
    assert len(images) == 28
    assert all((server.folder / "output" / image["filename"]).stat().st_size for image in images)


def test_a_file_added_later_is_found_and_read_again_when_it_changes(server: Server) -> None:
    path = server.folder / "models" / "linvideo" / "mine.safetensors"
    path.write_bytes(SHIPPED.read_bytes())
    try:
        assert server.queue(make_workflow(path.name))["status"]["status_str"] == "success"
        path.write_bytes(b"")
        assert server.queue(make_workflow(path.name))["status"]["status_str"] == "error"
    finally:
        path.unlink()


def test_graphs_with_different_files_do_not_disturb_each_other(server: Server) -> None:
    path = server.folder / "models" / "linvideo" / "other.safetensors"
    path.write_bytes(SHIPPED.read_bytes())
    frames: list[bytes] = []
    try:
        for turn, (file, strength) in enumerate(2 * [(FILE, 1.0), (path.name, 0.5)]):
            graph = make_workflow(file, strength=strength)
            graph["save"]["inputs"]["filename_prefix"] = f"turn{turn}"
            # Otherwise the second round would come from the server's cache.
            graph["demo"]["inputs"]["batch_size"] = 1 + turn // 2
            graph["sampler"]["inputs"]["latent_image"] = ["empty", 0]
            graph["empty"] = {
                "class_type": "LatentFromBatch",
                "inputs": {"samples": ["demo", 3], "batch_index": 0, "length": 1},
            }
            answer = server.queue(graph)
            assert answer["status"]["status_str"] == "success", answer["status"]
            image = answer["outputs"]["save"]["images"][14]["filename"]
            frames.append((server.folder / "output" / image).read_bytes())
    finally:
        path.unlink()
    pixels = [np.asarray(Image.open(io.BytesIO(frame))) for frame in frames]
    assert np.array_equal(pixels[0], pixels[2]) and np.array_equal(pixels[1], pixels[3])
    assert not np.array_equal(pixels[0], pixels[1])


def test_a_damaged_file_is_one_sentence_and_the_server_lives_on(server: Server) -> None:
    answer = server.queue(make_workflow("cut.safetensors"))
    assert answer["status"]["status_str"] == "error"
    (error,) = (data for kind, data in answer["status"]["messages"] if kind == "execution_error")
    message = error["exception_message"].strip()
    assert error["node_id"] == "linear"
    assert "damaged" in message and "\n" not in message
    again = server.queue(make_workflow(strength=0.9))
    assert again["status"]["status_str"] == "success"


def test_the_pack_loaded_without_a_complaint(server: Server) -> None:
    log = (server.folder / "log.txt").read_text()
    print(*(line for line in log.splitlines() if line.endswith("custom_nodes/LinVideo")))
    assert "LinVideo: the nodes" not in log
    assert "IMPORT FAILED" not in log
