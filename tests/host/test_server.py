"""The pack in a fresh ComfyUI server: its nodes, asked and queued over HTTP."""

import time
from typing import Any

import pytest
from PIL import Image

from tests.host.recording import tell_workflow
from tests.host.server import SHIPPED, Server

pytestmark = pytest.mark.host

TRANSFER_SECONDS = 900
FILE = "demo (comes with LinVideo)"
FEW_STEP_FILE = "demo in 4 steps (comes with LinVideo)"


def read_table(text: str) -> dict[str, str]:
    """Return what "name:TYPE name:TYPE" says."""
    return dict(entry.split(":") for entry in text.split())


# Saved workflows hold these names: none may change or go.
SETTINGS = read_table(
    "target:INT steps:INT batch_size:INT learning_rate:FLOAT cfg:FLOAT sampler_steps:INT "
    "num_videos:INT warm_start_steps:INT width:INT height:INT frames:INT parameters:COMBO "
    "lora_rank:INT objective:COMBO seed:INT tile:STRING attention_mass:COMBO"
)
PROMPTS = "MODEL:MODEL positive:CONDITIONING negative:CONDITIONING LATENT:LATENT"
SAMPLED = (
    "model:MODEL positive:CONDITIONING latent_image:LATENT seed:INT steps:INT cfg:FLOAT "
    "negative:CONDITIONING"
)
EXPORTED = (
    "clip:CLIP prompts:STRING negative:STRING filename:STRING overwrite:BOOLEAN "
    "images:CONDITIONING model:MODEL"
)
NODES = {
    "LinVideo": (
        read_table("model:MODEL mode:COMFY_DYNAMICCOMBO_V3"),
        read_table("MODEL:MODEL LINVIDEO:LINVIDEO report:IMAGE"),
    ),
    "LinVideoTransferSettings": (SETTINGS, {"settings": "LINVIDEO_SETTINGS"}),
    "LinVideoFewStepSampler": (read_table(SAMPLED), {"LATENT": "LATENT"}),
    "LinVideoFewStepSigmas": (
        read_table("source:MODEL,LINVIDEO steps:INT"),
        read_table("SIGMAS:SIGMAS SAMPLER:SAMPLER"),
    ),
    "LinVideoSave": (
        read_table("linvideo:LINVIDEO filename:STRING overwrite:BOOLEAN"),
        {"file": "STRING"},
    ),
    "LinVideoLoad": ({"file": "COMBO"}, {"LINVIDEO": "LINVIDEO"}),
    "LinVideoShowFile": ({"linvideo": "LINVIDEO"}, read_table("IMAGE:IMAGE text:STRING")),
    "LinVideoSoftmaxBackend": (
        read_table("model:MODEL backend:COMFY_DYNAMICCOMBO_V3"),
        {"MODEL": "MODEL"},
    ),
    "LinVideoExportPrompts": (read_table(EXPORTED), {"file": "STRING"}),
    "LinVideoDemo": (read_table("digit:COMBO direction:COMBO batch_size:INT"), read_table(PROMPTS)),
    "LinVideoDemoDecode": (read_table("samples:LATENT upscale:INT"), {"IMAGE": "IMAGE"}),
}
"""Each node's inputs and its outputs, with their types."""
TRANSFERRED = (
    "name:STRING quality:COMBO prompts:STRING keep_first_steps:INT positive:CONDITIONING "
    "negative:CONDITIONING clip:CLIP latent:LATENT settings:LINVIDEO_SETTINGS"
)
MODES = {
    "apply a saved file": read_table("file:COMBO strength:FLOAT keep_first_steps:INT"),
    "apply a connected LINVIDEO": read_table(
        "linvideo:LINVIDEO strength:FLOAT keep_first_steps:INT"
    ),
    "run the transfer now": read_table(TRANSFERRED),
}

AUTO = {
    **dict.fromkeys(SETTINGS, 0),
    "parameters": "lora",
    "objective": "velocity",
    "tile": "",
    "attention_mass": "query",
}
"""LinVideo Transfer Settings as it is added to a graph."""
SHORT = {
    "target": 4,
    "steps": 30,
    "batch_size": 2,
    "learning_rate": 0.001,
    "cfg": 3.0,
    "sampler_steps": 8,
    "num_videos": 2,
    "warm_start_steps": 2,
    "lora_rank": 4,
    "seed": 1,
}


def make_node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def make_workflow(file: str = FILE, *, strength: float = 1.0) -> dict[str, Any]:
    """Demo -> Linearize -> KSampler -> Demo Decode -> Save."""
    mode = {"mode": "apply a saved file", "mode.file": file, "mode.strength": strength}
    connected = {"model": ["linear", 0], "positive": ["demo", 1], "negative": ["demo", 2]}
    settings = {"seed": 5, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    return {
        "demo": make_node("LinVideoDemo", digit="three", direction="left", batch_size=1),
        "linear": make_node("LinVideo", model=["demo", 0], **mode, **{"mode.keep_first_steps": 0}),
        "sampler": make_node(
            "KSampler", **connected, latent_image=["demo", 3], **settings, denoise=1.0
        ),
        "decode": make_node("LinVideoDemoDecode", samples=["sampler", 0], upscale=4),
        "save": make_node("SaveImage", images=["decode", 0], filename_prefix="frames"),
    }


def make_transfer(*, name: str = "short", prompts: str = "", **changes: Any) -> dict[str, Any]:
    """The same workflow, its file made here and now, on latents of next to no size.

    changes: of the transfer's settings.
    """
    workflow = make_workflow()
    inputs = {"mode": "run the transfer now", "name": name, "quality": "draft"}
    inputs |= {"prompts": prompts, "keep_first_steps": 0}
    inputs |= {"latent": ["size", 0], "settings": ["settings", 0]}
    inputs = {name if name == "mode" else f"mode.{name}": x for name, x in inputs.items()}
    workflow["linear"]["inputs"] = {"model": ["demo", 0], **inputs}
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    workflow["size"] = make_node("EmptyHunyuanLatentVideo", **size)
    workflow["settings"] = make_node("LinVideoTransferSettings", **{**AUTO, **SHORT, **changes})
    return workflow


def types_of(inputs: dict[str, Any]) -> dict[str, str]:
    """Return the type of every input of an /object_info entry that a saved workflow holds."""
    return {
        name: "COMBO" if isinstance(entry[0], list) else entry[0]
        for group, entries in inputs.items()
        for name, entry in entries.items()
        if group != "hidden"
    }


@pytest.mark.parametrize("node", NODES)
def test_ids_inputs_and_outputs_are_frozen(node: str, server: Server) -> None:
    described = server.ask(f"/object_info/{node}")[node]
    outputs = dict(zip(described["output_name"], described["output"], strict=True))
    assert (types_of(described["input"]), outputs) == NODES[node]
    assert described["category"] == "LinVideo"
    assert described["display_name"].startswith("LinVideo ")
    for group in ("required", "optional"):
        assert all(entry[1]["tooltip"] for entry in described["input"].get(group, {}).values())


def test_every_setting_of_a_transfer_is_auto_as_the_node_is_added(server: Server) -> None:
    (described,) = server.ask("/object_info/LinVideoTransferSettings").values()
    # The optional ones are newer than workflows that were saved.
    inputs = described["input"]["required"] | described["input"]["optional"]
    assert {name: options["default"] for name, (_, options) in inputs.items()} == AUTO
    for name, (_, options) in inputs.items():
        if "min" in options and name != "seed":
            assert options["min"] == 0 and "0 is auto" in options["tooltip"]


def test_the_modes_and_their_inputs_are_frozen(server: Server) -> None:
    described = server.ask("/object_info/LinVideo")["LinVideo"]
    options = described["input"]["required"]["mode"][1]["options"]
    assert {option["key"]: types_of(option["inputs"]) for option in options} == MODES
    for group in (entries for option in options for entries in option["inputs"].values()):
        assert all(settings["tooltip"] for _, settings in group.values())
    file = options[0]["inputs"]["required"]["file"]
    names = file[0] if file[0] != "COMBO" else file[1]["options"]
    assert names == [FILE, FEW_STEP_FILE, "cut.safetensors"]


def test_the_demo_workflow_gives_frames(server: Server, record_property: Any) -> None:
    start = time.monotonic()
    answer = server.queue(make_workflow())
    seconds = round(time.monotonic() - start, 1)
    tell_workflow(record_property, server, "demo, shipped file applied", seconds)
    assert answer["status"]["status_str"] == "success", answer["status"]
    images = answer["outputs"]["save"]["images"]
    assert len(images) == 28
    assert all((server.folder / "output" / image["filename"]).stat().st_size for image in images)


def test_the_node_says_whether_the_model_is_the_files(server: Server) -> None:
    # Of its own: what comes from the server's cache is told, too, but by an earlier run.
    (said,) = server.queue(make_workflow(strength=0.75))["outputs"]["linear"]["text"]
    of_the_file, _, of_kernels = said.partition("made from.")
    assert f"{of_the_file}made from." == (
        "5 of 10 layers are linear, strength 0.75.\n"
        "The model has the weights that the file was made from."
    )
    # A GPU has fused kernels, which know no fp32 at this head size.
    assert of_kernels == "" or "the fused kernels know no float32" in of_kernels


def test_layers_are_timed_in_the_first_sampling_of_a_cached_node_alone(server: Server) -> None:
    workflow = make_workflow(strength=0.65)
    told = []
    for seed in (1, 2):
        workflow["sampler"]["inputs"]["seed"] = seed
        start = len(server.log.read_text())
        answer = server.queue(workflow)
        assert answer["status"]["status_str"] == "success", answer["status"]
        told.append(server.log.read_text()[start:].count("a linear layer takes"))
    assert told == [1, 0]


def test_a_file_added_later_is_found_and_read_again_when_it_changes(server: Server) -> None:
    path = server.folder / "models" / "linvideo" / "mine.safetensors"
    path.write_bytes(SHIPPED.read_bytes())
    try:
        assert server.queue(make_workflow(path.name))["status"]["status_str"] == "success"
        path.write_bytes(b"")
        assert server.queue(make_workflow(path.name))["status"]["status_str"] == "error"
    finally:
        path.unlink()


def make_save(source: str, filename: str) -> dict[str, Any]:
    return make_node("LinVideoSave", linvideo=[source, 0], filename=filename, overwrite=False)


def make_load(file: str = FILE) -> dict[str, Any]:
    return make_node("LinVideoLoad", file=file)


def read_frames(server: Server, answer: dict[str, Any]) -> list[bytes]:
    """Return the pixels of what a workflow's SaveImage wrote."""
    assert answer["status"]["status_str"] == "success", answer["status"]
    names = [image["filename"] for image in answer["outputs"]["save"]["images"]]
    return [Image.open(server.folder / "output" / name).tobytes() for name in names]


def test_what_is_saved_is_shown_and_can_be_loaded_and_connected(server: Server) -> None:
    show = make_node("LinVideoShowFile", linvideo=["load", 0])
    write = make_save("load", "mine/copy")
    answer = server.queue({"load": make_load(), "show": show, "write": write})
    for node in ("show", "write"):
        (image,) = answer["outputs"][node]["images"]
        with Image.open(server.folder / "temp" / image["filename"]) as picture:
            assert picture.width == 1024
    path = server.folder / "models" / "linvideo" / "mine" / "copy.safetensors"
    try:
        connected = make_workflow() | {"load": make_load("mine/copy.safetensors")}
        inputs = connected["linear"]["inputs"]
        del inputs["mode.file"]
        inputs |= {"mode": "apply a connected LINVIDEO", "mode.linvideo": ["load", 0]}
        frames = read_frames(server, server.queue(connected))
        chosen = make_workflow("mine/copy.safetensors")
        assert frames == read_frames(server, server.queue(chosen))
    finally:
        path.unlink()


def test_a_transfer_stops_on_interrupt_and_continues_when_it_is_queued_again(
    server: Server,
) -> None:
    listed = "a handwritten three moving left\na handwritten four moving up"
    transfer = make_transfer(prompts=listed)
    prompt_id = server.ask("/prompt", {"prompt": transfer})["prompt_id"]
    training = server.folder / "output" / "linvideo" / "short" / "training"
    deadline = time.monotonic() + TRANSFER_SECONDS
    while not (training / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, "training never began"
        time.sleep(0.05)
    start = time.monotonic()
    server.ask("/interrupt", {})
    answer = server.wait(prompt_id, TRANSFER_SECONDS)
    print(f"the transfer stopped {time.monotonic() - start:.2f} s after Interrupt")
    assert "execution_interrupted" in [kind for kind, _ in answer["status"]["messages"]]
    assert (training / "checkpoint.safetensors").exists()
    made = server.folder / "models" / "linvideo" / "short.safetensors"
    assert not made.exists()

    again = server.queue(transfer, seconds=TRANSFER_SECONDS)
    assert again["status"]["status_str"] == "success", again["status"]
    assert len(again["outputs"]["save"]["images"]) == 28
    try:
        applied = server.queue(make_workflow(made.name))
        assert applied["status"]["status_str"] == "success"
    finally:
        made.unlink()
