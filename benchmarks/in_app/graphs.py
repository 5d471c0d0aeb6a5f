"""The graphs that are queued, in API format: by node id, class and inputs."""

from collections.abc import Mapping
from typing import Any

from ..models.sizes import GUIDANCE_SCALE, Size

Nodes = dict[str, dict[str, Any]]

TRANSFER = "run the transfer now"
_PLAIN_SAMPLING = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def load_wan(file: str, weight_dtype: str, shift: float) -> Nodes:
    """Return a loader of a safetensors or GGUF file whose MODEL is `["model", 0]`."""
    if file.endswith(".gguf"):
        loader = _node("UnetLoaderGGUF", unet_name=file)
    else:
        loader = _node("UNETLoader", unet_name=file, weight_dtype=weight_dtype)
    shifted = _node("ModelSamplingSD3", model=["loader", 0], shift=shift)
    return {"loader": loader, "model": shifted}


def load_minimax_h3(file: str) -> Nodes:
    """Return the same for MiniMax-H3, whose shift is its own."""
    return {"model": _node("UNETLoader", unet_name=file, weight_dtype="default")}


def describe_video(size: Size, frames: int) -> Nodes:
    """Return prompts of random numbers and an empty latent for Wan."""
    latent = {"width": size.width, "height": size.height, "length": frames, "batch_size": 1}
    prompts = draw_prompts(size.prompt_tokens, size.config.text_dim)
    return {**prompts, "latent": _node("EmptyHunyuanLatentVideo", **latent)}


def draw_prompts(tokens: int, width: int) -> Nodes:
    """Return a positive and a negative prompt of random numbers."""
    settings = {"tokens": tokens, "width": width, "again": 0}
    return {
        "positive": _node("LinVideoBenchmarkConditioning", seed=1, **settings),
        "negative": _node("LinVideoBenchmarkConditioning", seed=2, **settings),
    }


def empty_minimax_h3(width: int, height: int, frames: int) -> Nodes:
    """Return an empty latent of video and audio."""
    sizes = {"width": width, "height": height, "length": frames}
    return {"latent": _node("EmptyMiniMaxH3LatentAV", **sizes)}


def sample(source: str, steps: int, tag: str, *, cfg: float = 1.0, seed: int = 5) -> Nodes:
    """Return a sampler on a node's MODEL, and what keeps its latents under a tag."""
    sampler = _node(
        "KSampler",
        model=[source, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        **_PLAIN_SAMPLING,
    )
    return {
        "sampler": sampler,
        "kept": _node("LinVideoBenchmarkLatent", latent=["sampler", 0], tag=tag),
    }


def again(graph: Nodes, number: int) -> Nodes:
    """Return a graph with the same prompts under another number, so that it is sampled again."""
    prompt = graph["positive"]
    return {**graph, "positive": _node(**_renumbered(prompt, number))}


def _renumbered(prompt: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {"kind": prompt["class_type"], **prompt["inputs"], "again": number}


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
    for source, tag in (("linear", "demo_linear"), ("model", "demo_base")):
        sampled = sample(source, 20, tag, cfg=3.0)
        sampled["sampler"]["inputs"] |= {
            "positive": ["model", 1],
            "negative": ["model", 2],
            "latent_image": ["model", 3],
        }
        sampled["kept"]["inputs"]["latent"] = [f"{tag} sampler", 0]
        nodes |= {f"{tag} {key}": node for key, node in sampled.items()}
    return nodes


def _linearize(name: str, quality: str, **sockets: Any) -> dict[str, Any]:
    inputs = {"mode.name": name, "mode.quality": quality, "mode.prompts": ""}
    inputs |= {"model": ["model", 0], "mode": TRANSFER, "mode.keep_first_steps": 0}
    return {"class_type": "LinVideo", "inputs": inputs | sockets}
