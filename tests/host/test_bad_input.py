"""What cannot work, queued over HTTP: one sentence at its node, and the server lives on."""

import itertools
import json
import shutil
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest

from linvideo_core import artifact
from linvideo_core.demo import weights_path
from linvideo_core.models.wan import WanModel
from tests.host.server import WORKFLOW_SECONDS, Server
from tests.host.test_server import (
    make_load,
    make_node,
    make_save,
    make_transfer,
    make_workflow,
)
from tests.host.test_workflows import TINY, make_linvideo_file

pytestmark = pytest.mark.host

_seeds = itertools.count(1000)


@pytest.fixture(scope="module")
def models(server: Server) -> Iterator[None]:
    """A file for a smaller model, and the demo's weights as a Wan of which nothing is known."""
    folder = server.folder / "models"
    foreign = folder / "linvideo" / "foreign.safetensors"
    artifact.save(make_linvideo_file(WanModel(TINY)), foreign)
    wan = folder / "diffusion_models" / "wan.safetensors"
    wan.parent.mkdir(exist_ok=True)
    wan.write_bytes(weights_path("model.safetensors").read_bytes())
    yield
    foreign.unlink()
    wan.unlink()


def make_still(workflow: dict[str, Any], node: str, name: str) -> dict[str, Any]:
    """Connect the empty latent of a still picture, of 4 channels, to an input."""
    workflow["still"] = make_node("EmptyLatentImage", width=64, height=64, batch_size=1)
    workflow[node]["inputs"][name] = ["still", 0]
    return workflow


def make_transfer_of_wan() -> dict[str, Any]:
    """Train a model that brings no prompts of its own."""
    workflow = make_transfer(name="refused")
    workflow["wan"] = make_node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default")
    workflow["linear"]["inputs"]["model"] = ["wan", 0]
    return workflow


def change(
    workflow: dict[str, Any], node: str, gone: tuple[str, ...] = (), **inputs: Any
) -> dict[str, Any]:
    """Set inputs of a node, "mode__strength" being "mode.strength", and leave others out."""
    changed = workflow[node]["inputs"]
    changed |= {name.replace("__", "."): value for name, value in inputs.items()}
    for name in gone:
        del changed[name]
    return workflow


def make_backend(**inputs: Any) -> dict[str, Any]:
    """Put LinVideo Softmax Backend behind the linearized model."""
    workflow = make_workflow()
    workflow["backend"] = make_node("LinVideoSoftmaxBackend", model=["linear", 0], **inputs)
    return change(workflow, "sampler", model=["backend", 0])


CASES = {
    "a strength that is no number": (
        change(make_workflow(), "linear", mode__strength="nan"), "linear",
        "strength nan given; a number from 0 to 2 is needed",
    ),
    "a strength that is bare NaN": (
        change(make_workflow(), "linear", mode__strength=float("nan")), "linear",
        "strength nan given; a number from 0 to 2 is needed",
    ),
    "another version's mode": (
        change(make_workflow(), "linear", mode="train it"), "linear",
        "mode 'train it' given, which is not known here; one of 'apply a saved file', ",
    ),
    "no mode": (
        change(make_workflow(), "linear", ("mode",)), "linear",
        "no mode given; one of 'apply a saved file', ",
    ),
    "another version's backend": (
        make_backend(backend="nope"), "backend",
        "backend 'nope' given, which is not known here; one of 'auto', 'default', ",
    ),
    "no backend": (make_backend(), "backend", "no backend given; one of 'auto', 'default', "),
    "a damaged file": (make_workflow("cut.safetensors"), "linear", "damaged"),
    "a file for another model": (make_workflow("foreign.safetensors"), "linear", "2 layers"),
    "latents of another channel count": (
        make_still(make_workflow(), "decode", "samples"), "decode", "[1, 4, 8, 8]",
    ),
    "no prompts": (make_transfer_of_wan(), "linear", "positive is not connected"),
    "a word that the demo does not know": (
        make_transfer(name="refused", prompts="a handwritten cat"), "linear", "'cat'",
    ),
    "a filename that leads out": (
        {"load": make_load(), "write": make_save("load", "../mine")}, "write", "filename",
    ),
    "a filename of several lines": (
        {"load": make_load(), "write": make_save("load", "a\0b\nc")}, "write", "filename",
    ),
}  # fmt: skip
"""What is queued, the node that refuses it, and words of its message."""


def assert_lives_on(server: Server) -> None:
    good = make_workflow()
    good["sampler"]["inputs"] |= {"seed": next(_seeds), "steps": 1}
    answer = server.queue(good)
    assert answer["status"]["status_str"] == "success", answer["status"]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_the_server_lives_on(
    case: str, server: Server, models: None
) -> None:
    workflow, node, words = CASES[case]
    answer = server.queue(workflow)
    assert answer["status"]["status_str"] == "error"
    (error,) = (data for kind, data in answer["status"]["messages"] if kind == "execution_error")
    message = error["exception_message"].strip()
    assert error["node_id"] == node
    assert words in message and "\n" not in message and len(message) < 400, message
    # The panel shows it above the message: no path of this machine, and not the pack's folder.
    assert error["exception_type"] in ("ValueError", "linvideo_core.artifact.ArtifactError")
    assert_lives_on(server)


@pytest.mark.parametrize("node", ["LinVideo", "LinVideoLoad"])
def test_a_file_that_is_not_there_is_refused_before_anything_runs(
    node: str, server: Server
) -> None:
    workflow = make_workflow("gone.safetensors")
    if node == "LinVideoLoad":
        show = make_node("LinVideoShowFile", linvideo=["linear", 0])
        workflow = {"linear": make_load("gone.safetensors"), "show": show}
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask("/prompt", {"prompt": workflow})
    (error,) = json.load(refused.value)["node_errors"]["linear"]["errors"]
    assert error["type"] == "value_not_in_list" and "gone.safetensors" in error["details"]
    assert_lives_on(server)


def test_a_file_that_goes_while_its_graph_waits_is_one_sentence(server: Server) -> None:
    path = server.folder / "models" / "linvideo" / "going.safetensors"
    path.write_bytes(weights_path("linearized.safetensors").read_bytes())
    first = make_workflow()
    first["sampler"]["inputs"] |= {"seed": next(_seeds), "steps": 20}
    waiting = make_workflow(path.name)
    prompts = [server.ask("/prompt", {"prompt": graph}) for graph in (first, waiting)]
    path.unlink()
    answer = server.wait(prompts[1]["prompt_id"], WORKFLOW_SECONDS)
    (error,) = (data for kind, data in answer["status"]["messages"] if kind == "execution_error")
    message = error["exception_message"].strip()
    assert error["node_id"] == "linear"
    assert "going.safetensors is not in models/linvideo" in message and "\n" not in message
    assert_lives_on(server)


def test_a_models_folder_that_is_renamed_costs_no_shipped_file(server: Server) -> None:
    folder = server.folder / "models" / "linvideo"
    assert_lives_on(server)
    moved = folder.rename(folder.with_name("moved"))
    try:
        assert_lives_on(server)
        saved = server.queue({"load": make_load(), "write": make_save("load", "again")})
        assert saved["status"]["status_str"] == "success", saved["status"]
        assert [path.name for path in folder.iterdir()] == ["again.safetensors"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        moved.rename(folder)
    assert_lives_on(server)
