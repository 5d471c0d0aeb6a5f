"""The workflows of the pack, opened as ComfyUI's browser opens them and run by a real server.

Checkpoints are small random ones under the names that the workflows hold. Only the text encoder
has no small form: the demo's prompts, as wide as Wan's, stand in for it.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from linvideo_core import __version__, artifact
from linvideo_core.artifact import Artifact, ArtifactHeader
from linvideo_core.models import attention_sites
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.prompts import NEGATIVE_PROMPT
from tests.host.process import PACK
from tests.host.recording import tell_workflow
from tests.host.saved_workflows import FILES, NAMES, Nodes, make_prompt, read, read_note
from tests.host.server import Server
from tests.host.test_server import AUTO

pytestmark = pytest.mark.host

TRAINED_AT = {
    "4 Make a file for Wan 2.1": (5, 3),
    "5 Wan 2.1 made linear": (5, 3),
    "6 Wan 2.1 with LoRA and backend": (5, 3),
    "7 Wan 2.2 with two experts": (3.5, 12),
}
"""Guidance and shift of the trainings that README and docs/home.md describe."""
NEEDS = {"lora_and_backend": "ModelAttentionBackend", "wan_2.1_no_file": "BlockSparseAttention"}
"""Workflows that an older ComfyUI cannot run, each with a node of the ComfyUIs that can."""
SIZE = 64, 64, 5
TINY = WanConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=256)
LINEAR_LAYER = 1
SHORTEST = {"steps": 4, "batch_size": 1, "warm_start_steps": 2, "num_videos": 2, "sampler_steps": 8}
HALVES = ("high", "low")


def stand_in(prompt: Nodes) -> Nodes:
    """Replace the text encoder by the demo's prompts; few steps of a small video, a short training.

    Everything else is run as it was saved.
    """
    by_type: dict[str, list[dict[str, Any]]] = {}
    for node in prompt.values():
        by_type.setdefault(node["class_type"], []).append(node["inputs"])
    if "CLIPLoader" in by_type:
        for inputs in by_type.get("LinVideo", []):
            if inputs.pop("mode.clip", None):
                inputs |= {"mode.prompts": "", "mode.positive": ["words", 1]}
        texts = [key for key, node in prompt.items() if node["class_type"] == "CLIPTextEncode"]
        prompt = {
            key: node
            for key, node in prompt.items()
            if node["class_type"] not in ("CLIPLoader", "CLIPTextEncode")
        }
        prompt["words"] = {
            "class_type": "LinVideoDemo",
            "inputs": {"digit": "one", "direction": "up", "batch_size": 1},
        }
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in texts:
                    node["inputs"][name] = ["words", 1 + texts.index(value[0])]
    for inputs in by_type.get("EmptyHunyuanLatentVideo", []):
        inputs.update(zip(("width", "height", "length"), SIZE, strict=True))
    if "UNETLoader" in by_type:
        for inputs in by_type.get("KSampler", []):
            inputs["steps"] = 2
    for inputs in by_type.get("LinVideo", []):
        if inputs["mode"] == "run the transfer now":
            settings = {"class_type": "LinVideoTransferSettings", "inputs": AUTO | SHORTEST}
            prompt["settings"] = settings
            inputs["mode.settings"] = ["settings", 0]
            # What it makes is there already, for the workflows that apply it.
            inputs["mode.name"] += " anew"
    return prompt


def save_vae(path: str) -> None:
    """Save a small random VAE of Wan 2.1's kind; runs in ComfyUI's process."""
    import comfy.ldm.wan.vae
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    vae = comfy.ldm.wan.vae.WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    safetensors.torch.save_file(vae.state_dict(), path)


def make_linvideo_file(model: WanModel) -> Artifact:
    """Return random feature maps for one layer of a model."""
    family, sites = identify(attention_sites.shapes_of(model))
    site = sites[LINEAR_LAYER]
    header = ArtifactHeader(
        family=family.name,
        fingerprint=attention_sites.fingerprint(family, sites),
        weights_digest="0" * 16,
        num_layers=len(sites),
        linear_layers=(site.layer,),
        site_names=(site.name,),
        feature_dim=2 * site.head_dim,
        parameters="feature_maps",
        objective="none",
        steps=0,
    )
    shape = (site.num_heads, site.head_dim, site.head_dim)
    names = ("query_map", "key_map")
    maps = {site.layer: {name: 0.1 * torch.randn(shape) for name in names}}
    return Artifact(header=header, linear=maps)


@pytest.fixture(scope="module")
def models(host: Any, server: Server) -> Iterator[Path]:
    """The server's models folder with a file under every name that the workflows hold."""
    folder = server.folder / "models"
    for kind in ("diffusion_models", "vae", "loras"):
        (folder / kind).mkdir(exist_ok=True)
    kept = set((folder / "linvideo").iterdir())
    torch.manual_seed(1)
    model = WanModel(TINY)
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    lora = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": 0.1 * torch.randn(shape)
        for side, shape in (("A", (4, TINY.dim)), ("B", (TINY.dim, 4)))
    }
    experts = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled" for noise in HALVES)
    for name in ("wan2.1_t2v_1.3B_fp16", *experts):
        save_file(model.state_dict(), folder / "diffusion_models" / f"{name}.safetensors")
    save_file(lora, folder / "loras" / "your_lora.safetensors")
    host.call(save_vae, str(folder / "vae" / "wan_2.1_vae.safetensors"))
    linvideo = make_linvideo_file(model)
    for name in ("my Wan 2.1 1.3B", *(f"my Wan 2.2 {noise} noise" for noise in HALVES)):
        artifact.save(linvideo, folder / "linvideo" / f"{name}.safetensors")
    yield folder
    for path in set((folder / "linvideo").iterdir()) - kept:
        path.unlink()


@pytest.mark.parametrize("name", FILES)
def test_a_workflow_runs_as_it_was_saved(
    name: str, server: Server, models: Path, record_property: Any
) -> None:
    nodes = server.ask("/object_info")
    if (needed := NEEDS.get(NAMES[name])) and needed not in nodes:
        pytest.skip(f"needs a ComfyUI with {needed}")
    prompt = stand_in(make_prompt(read(name), nodes))
    server.forget()
    start = time.monotonic()
    answer = server.queue(prompt)
    tell_workflow(record_property, server, NAMES[name], round(time.monotonic() - start, 1))
    assert answer["status"]["status_str"] == "success", answer["status"]
    savers = [key for key, node in prompt.items() if node["class_type"].startswith("Save")]
    assert savers
    for key in savers:
        (saved,) = answer["outputs"][key]["images"]
        path = server.folder / "output" / saved["subfolder"] / saved["filename"]
        assert path.stat().st_size > 500


def test_the_template_browser_lists_every_workflow_with_its_picture(server: Server) -> None:
    assert list(FILES) == list(NAMES)
    assert set(server.ask("/api/workflow_templates")["LinVideo"]) == NAMES.keys()
    for name, file in FILES.items():
        listed = server.ask(f"/api/workflow_templates/LinVideo/{quote(name)}.json")
        assert listed == read(name)
        with Image.open(file.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG" and picture.width <= 960


@pytest.mark.parametrize("name", TRAINED_AT)
def test_a_workflow_samples_as_its_file_was_trained_and_says_so(name: str) -> None:
    nodes = read(name)["nodes"]
    guidance, shift = TRAINED_AT[name]
    values = {node["id"]: node["widgets_values"] for node in nodes if "widgets_values" in node}
    shifts = [values[node["id"]][0] for node in nodes if node["type"] == "ModelSamplingSD3"]
    samplers = {"KSampler": 3, "KSamplerAdvanced": 4}
    guidances = [
        values[node["id"]][samplers[node["type"]]] for node in nodes if node["type"] in samplers
    ]
    assert set(shifts) == {shift} and set(guidances) == {guidance}
    assert NEGATIVE_PROMPT in itertools.chain(*values.values())
    note = read_note(name).lower()
    assert f"shift {shift}" in note and f"cfg {guidance}" in note


@pytest.mark.parametrize("name", FILES)
def test_a_workflow_says_what_it_is_for_and_holds_nothing_stale(name: str) -> None:
    assert read_note(name).startswith("# ")
    text = FILES[name].read_text(encoding="utf-8")
    # Of the machine that it was made on.
    assert not any(trace in text for trace in ("/root", "/home", "127.0.0.1", "localhost"))
    for node in read(name)["nodes"]:
        pack = (node["properties"].get("cnr_id"), node["properties"].get("ver"))
        assert (pack == ("linvideo", __version__)) == node["type"].startswith("LinVideo"), node
        if "widgets_values_named" in node:
            assert list(node["widgets_values_named"].values()) == node["widgets_values"]


@pytest.mark.parametrize("name", FILES)
def test_a_workflow_offers_its_models_in_the_hosts_form(name: str) -> None:
    listed = (PACK / "docs" / "files.md").read_text(encoding="utf-8")
    for node in read(name)["nodes"]:
        for model in node["properties"].get("models", []):
            assert model.keys() == {"name", "url", "directory"}
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].partition("/resolve/main/")[2].endswith(model["name"])
            # A LINVIDEO file is offered only where there is one.
            assert node["type"] != "LinVideo" or model["url"] in listed


def test_every_node_has_a_help_page(server: Server) -> None:
    described = server.ask("/object_info")
    nodes = {name for name in described if name.startswith("LinVideo")}
    pages = {file.stem for file in (PACK / "web" / "docs").glob("*.md")}
    assert pages == nodes
    for name in nodes:
        page = server.read(f"/extensions/LinVideo/docs/{name}.md").decode()
        assert page.startswith(f"# {described[name]['display_name']}\n")
