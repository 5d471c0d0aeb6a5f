"""Small models with random weights of their own, recognised by ComfyUI's own loader."""

import dataclasses
import importlib
import json
import math
import unittest
from typing import Any

import comfy.nested_tensor
import comfy.sd
import torch
from comfy.quant_ops import QuantizedTensor
from linvideo_pack.linvideo_core.artifact import Artifact, ArtifactHeader
from linvideo_pack.linvideo_core.models import attention_sites
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.linvideo_core.models.families import identify
from stage import MODEL_OF_SHAPES
from torch import Tensor

FHW = 3, 8, 8
"""Frames, height and width of latents."""

_SINCE = {
    "MiniMaxH3Model": "0.30.0",
    "WanAnimate2Model": "0.31.0",
}


def random_tensor(*shape: int, seed: int = 1) -> Tensor:
    """Return normal random numbers, the same ones for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _many(shape: torch.Size, seed: int) -> Tensor:
    """Return random numbers that repeat after a prime number of them: some weights are large."""
    size = math.prod(shape)
    return random_tensor(99991, seed=seed).repeat(size // 99991 + 1)[:size].reshape(shape)


def build(
    module: str,
    class_name: str,
    config: dict[str, Any],
    metadata: dict | None = None,
    kind: str | None = None,
) -> Any:
    """Return a ModelPatcher of a variant with random weights, by way of ComfyUI's loader.

    kind: the host's name for it, where its class has several.
    """
    try:
        model_class = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError):
        needed = f"needs ComfyUI >= {_SINCE[class_name]}: {class_name}"
        raise unittest.SkipTest(needed) from None
    empty = model_class(**config, **MODEL_OF_SHAPES)
    weights = {}
    for seed, (name, tensor) in enumerate(empty.state_dict().items()):
        scale = 0.5 / math.sqrt(max(tensor[0].numel(), 1)) if tensor.ndim > 1 else 0.1
        is_gain = "norm" in name and name.endswith("weight") and tensor.ndim == 1
        weights[name] = scale * _many(tensor.shape, seed) + is_gain
    keywords = {} if metadata is None else {"metadata": {"config": json.dumps(metadata)}}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        weights, {"dtype": torch.float32}, **keywords
    )
    assert type(patcher.model.diffusion_model) is model_class, type(patcher.model.diffusion_model)
    assert kind is None or type(patcher.model).__name__ == kind, type(patcher.model)
    return patcher


def minimax_h3(**changes: Any) -> tuple[Any, Any]:
    """Return a ModelPatcher and noise for its two streams; changes: of its configuration."""
    config = {
        "hidden_size": 192,
        "num_layers": 3,
        "token_refiner_num_layers": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 128,
        "ffn_hidden_size": 64,
        "text_dim": 40,
        "timestep_input_dim": 16,
        "time_embed_hidden_size": 24,
        "time_embed_dim": 24,
        **changes,
    }
    patcher = build("comfy.ldm.minimax.model", "MiniMaxH3Model", config)
    streams = [random_tensor(1, 24, *FHW), random_tensor(1, 32, 2, 7)]
    return patcher, comfy.nested_tensor.NestedTensor(streams)


def make_artifact(patcher: Any, form: LinearForm | None = None) -> Artifact:
    """Return random feature maps, and what else a form has, for layers 0 and 2 of a model."""
    family, sites = identify(attention_sites.shapes_of(patcher.model.diffusion_model))
    chosen = [sites[layer] for layer in (0, 2)]
    header = ArtifactHeader(
        family=family.name,
        fingerprint=attention_sites.fingerprint(family, sites),
        weights_digest="0" * 16,
        num_layers=len(sites),
        linear_layers=tuple(site.layer for site in chosen),
        site_names=tuple(site.name for site in chosen),
        feature_dim=2 * chosen[0].head_dim,
        parameters="feature_maps",
        objective="none",
        steps=0,
        **dataclasses.asdict(form or LinearForm()),
    )
    shapes = header.tensor_shapes(chosen[0].num_heads, chosen[0].head_dim)
    maps = {
        site.layer: {
            name: 0.3 * random_tensor(*shape, seed=10 * site.layer + side)
            for side, (name, shape) in enumerate(shapes.items())
        }
        for site in chosen
    }
    return Artifact(header=header, linear=maps)


def quantise(
    tensors: dict[str, Tensor], names: list[str], form: str, layout: str
) -> dict[str, Tensor]:
    """Return a checkpoint with some of its weights in ComfyUI's own quantised form."""
    tensors = dict(tensors)
    settings = json.dumps({"format": form, "full_precision_matrix_mult": True}).encode()
    for name in names:
        stem = name.removesuffix("weight")
        kept = QuantizedTensor.from_float(tensors.pop(name).float(), layout)
        tensors |= {stem + key: tensor for key, tensor in kept.state_dict("weight").items()}
        tensors[f"{stem}comfy_quant"] = torch.tensor([*settings], dtype=torch.uint8)
    return tensors
