"""The graphs that are queued, in API format: by node id, class and inputs."""

from collections.abc import Mapping
from typing import Any

from linvideo_core.kernels.softmax import DENSITY

from ..models.sizes import GUIDANCE_SCALE, Size

Nodes = dict[str, dict[str, Any]]

KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cuDNN": ("LinVideoSoftmaxBackend", {"backend": "cuDNN"}),
    "sparse": (
        "LinVideoSoftmaxBackend",
        {
            "backend": "sparse (Sol-Attn)",
            "backend.density": DENSITY,
            "backend.start_percent": 0.2,
            "backend.end_percent": 1.0,
            "backend.dense_layers": "",
        },
    ),
    "ComfyUI's sparse": (
        "BlockSparseAttention",
        {
            "selection": "sol-attn",
            "selection.tau": 1.3,
            "start_percent": 0.2,
            "end_percent": 1.0,
            "dense_blocks": "",
            "min_tokens": 12288,
            "extra_tokens": 256,
            "sink_conditioning": "exact_kv_and_rows",
            "verbose": False,
        },
    ),
}
"""What computes softmax attention -> the node for it, and its inputs as it is added."""


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def load_wan(file: str, weight_dtype: str, size: Size, frames: int) -> Nodes:
    """Return a Wan of a safetensors or GGUF file, random prompts and an empty latent.

    Of this as of `load_minimax_h3`: MODEL is `["model", 0]`, the others `["positive", 0]`,
    `["negative", 0]` and `["latent", 0]`.
    """
    if file.endswith(".gguf"):
        loader = _node("UnetLoaderGGUF", unet_name=file)
    else:
        loader = _node("UNETLoader", unet_name=file, weight_dtype=weight_dtype)
    video = {"width": size.width, "height": size.height, "length": frames, "batch_size": 1}
    return {
        "loader": loader,
        "model": _node("ModelSamplingSD3", model=["loader", 0], shift=size.shift),
        "latent": _node("EmptyHunyuanLatentVideo", **video),
        **_draw_prompts(size.prompt_tokens, size.config.text_dim),
    }


def load_minimax_h3(file: str, text_dim: int, width: int, height: int, frames: int) -> Nodes:
    """Return the same for a MiniMax-H3, whose shift is its own; its latent has audio, too."""
    video = {"width": width, "height": height, "length": frames}
    return {
        "model": _node("UNETLoader", unet_name=file, weight_dtype="default"),
        "latent": _node("EmptyMiniMaxH3LatentAV", **video),
        **_draw_prompts(64, text_dim),
    }


def _draw_prompts(tokens: int, width: int) -> Nodes:
    settings = {"tokens": tokens, "width": width, "again": 0}
    return {
        name: _node("LinVideoBenchmarkConditioning", seed=seed, **settings)
        for seed, name in enumerate(("positive", "negative"), start=1)
    }


def sample(source: str, steps: int, tag: str, *, cfg: float = 1.0, seed: int = 5) -> Nodes:
    """Return a sampler on a node's MODEL, and what keeps its latents under a tag."""
    sockets = {name: [name, 0] for name in ("positive", "negative")}
    plain = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sockets |= {"model": [source, 0], "latent_image": ["latent", 0]}
    return {
        "sampler": _node("KSampler", **sockets, seed=seed, steps=steps, cfg=cfg, **plain),
        "kept": _node("LinVideoBenchmarkLatent", latent=["sampler", 0], tag=tag),
    }


def sample_few(source: str, tag: str, *, seed: int = 5) -> Nodes:
    """Return the few-step sampler on a node's MODEL, in the steps of its file, without guidance."""
    sockets = {"model": [source, 0], "positive": ["positive", 0], "latent_image": ["latent", 0]}
    return {
        "sampler": _node("LinVideoFewStepSampler", **sockets, seed=seed, steps=0, cfg=1.0),
        "kept": _node("LinVideoBenchmarkLatent", latent=["sampler", 0], tag=tag),
    }


def again(graph: Nodes, number: int) -> Nodes:
    """Return a graph with the same prompts under another number, so that it is sampled again."""
    positive = graph["positive"]
    return {**graph, "positive": {**positive, "inputs": {**positive["inputs"], "again": number}}}


def transfer(name: str, defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> Nodes:
    """Return a transfer on `["model", 0]` whose MODEL is `["linear", 0]`.

    defaults: every setting's value as the settings' node is added. settings: those that are set.
    """
    chosen = {"cfg": GUIDANCE_SCALE, "batch_size": 1, "lora_rank": 32, **settings}
    sockets = {f"mode.{x}": [x, 0] for x in ("positive", "negative", "latent", "settings")}
    return {
        "settings": _node("LinVideoTransferSettings", **{**defaults, **chosen}),
        "linear": _linearize(name, "draft", **sockets),
    }


def transfer_demo(name: str, quality: str, settings: Mapping[str, Any] | None) -> Nodes:
    """Return the template that makes a file of the demo's model, with a sampler on each model.

    settings: every one of a shorter transfer's; none: found out by the node, as in the template.
    """
    demo = _node("LinVideoDemo", digit="five", direction="up-left", batch_size=1)
    sockets = {} if settings is None else {"mode.settings": ["settings", 0]}
    nodes = {"model": demo, "linear": _linearize(name, quality, **sockets)}
    if settings is not None:
        nodes["settings"] = _node("LinVideoTransferSettings", **settings)
    outputs = {"positive": ["model", 1], "negative": ["model", 2], "latent_image": ["model", 3]}
    for source, tag in (("linear", "demo_linear"), ("model", "demo_base")):
        sampled = sample(source, 20, tag, cfg=3.0)
        sampled["sampler"]["inputs"] |= outputs
        sampled["kept"]["inputs"]["latent"] = [f"{tag} sampler", 0]
        nodes |= {f"{tag} {key}": node for key, node in sampled.items()}
    return nodes


def apply_file(file: str) -> Nodes:
    """Return a LINVIDEO file applied to `["model", 0]`, whose MODEL is `["linear", 0]`."""
    inputs = {"mode": "apply a saved file", "mode.file": file, "mode.strength": 1.0}
    return {
        "linear": _node("LinVideo", model=["model", 0], **inputs, **{"mode.keep_first_steps": 0})
    }


def choose_softmax(source: str, kernel: str, start_percent: float) -> Nodes:
    """Return a node's softmax attention by one of KERNELS, whose MODEL is `["chosen", 0]`.

    start_percent: the part of sampling, 0 to 1, that comes before a sparse kernel's.
    """
    kind, inputs = KERNELS[kernel]
    starts = {name: start_percent for name in inputs if name.endswith("start_percent")}
    return {"chosen": _node(kind, model=[source, 0], **inputs | starts)}


def _linearize(name: str, quality: str, **sockets: Any) -> dict[str, Any]:
    inputs = {"mode.name": name, "mode.quality": quality, "mode.prompts": ""}
    inputs |= {"mode": "run the transfer now", "mode.keep_first_steps": 0}
    return _node("LinVideo", model=["model", 0], **inputs, **sockets)
